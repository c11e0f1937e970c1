"""`python -m benchmarks.gpu`: it runs without a GPU at a small size, and only a GPU's figures reach the document."""

import json
import logging
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import gpu
from gpt.errors import UserError

FIGURES = {
    "dtype": "bfloat16",
    "micro_batch_size": 32,
    "tokens_per_second": 300_000.0,
    "milliseconds": {"data": 0.0, "forward": 30.0, "backward": 65.0, "optimizer": 5.0},
    "peak_memory_bytes": 30 * 10**9,
    "mfu": 0.3,
    "mfu_data_sheet": 0.25,
    "warnings": [],
}
H100: dict[str, Any] = {
    "device": "NVIDIA H100 80GB HBM3",
    "kind": "cuda",
    "torch": "2.13.0",
    "cuda": "12.8",
    "driver": "NVRM version: NVIDIA UNIX x86_64 Kernel Module 570.1",
    "size": "gpt2-124m, 32 sequences of 1024 tokens",
    "selftest": {"checks": [{"name": "forward pass", "state": "passed", "detail": ""}]},
    "training": {"eager": FIGURES, "nanoGPT, eager": {"tokens_per_second": 250_000.0}, "compiled": "out of time"},
    "generation": {"1 text": {"tokens_per_second": 150.0}},
}


def test_everything_is_measured_on_a_cpu_and_the_document_is_left(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    document = tmp_path / "gpu.md"
    document.write_text(gpu.DOCUMENT.read_text(encoding="utf-8"), encoding="utf-8")
    gpu.main(["--device", "cpu", "--document", str(document), "--json", str(tmp_path / "figures.json")])
    result = json.loads((tmp_path / "figures.json").read_text(encoding="utf-8"))
    measured = {name for name, figures in result["training"].items() if isinstance(figures, dict)}
    assert measured == {
        *("eager", "float16", "Muon", "document mask", "block checkpointing", "defaults", "reproducible")
    }
    assert result["selftest"]["passed"] is True
    assert all(figures["tokens_per_second"] > 0 for figures in result["generation"].values())
    assert "| defaults: " in capsys.readouterr().out
    assert document.read_text(encoding="utf-8") == gpu.DOCUMENT.read_text(encoding="utf-8")


def test_document_has_a_place_for_the_tables_and_no_figures_of_a_cpu() -> None:
    _, _, rest = gpu.DOCUMENT.read_text(encoding="utf-8").partition(gpu.BEGIN)
    tables, end, _ = rest.partition(gpu.END)
    assert end
    assert tables.strip() == gpu.NOT_MEASURED or tables.strip().startswith(("NVIDIA", "Tesla", "AMD"))


def test_figures_of_a_gpu_replace_the_tables_of_the_document(tmp_path: Path) -> None:
    document = tmp_path / "gpu.md"
    document.write_text(f"# GPUs\n\n{gpu.BEGIN}\n\n{gpu.NOT_MEASURED}\n\n{gpu.END}\n\nMore.\n", encoding="utf-8")
    for _ in range(2):
        gpu.write_tables(document, gpu.format_tables(H100))
    text = document.read_text(encoding="utf-8")
    assert text.startswith(
        f"# GPUs\n\n{gpu.BEGIN}\n\nNVIDIA H100 80GB HBM3, 989 TFLOP/s by its data sheet. torch 2.13.0"
    )
    assert "| eager | bfloat16 | 300 k | 25.0% | 30.0% | 30 GB | 5.0% |" in text
    assert "| nanoGPT, eager | | 250 k | | | | |" in text
    assert "| compiled | | not measured: out of time | | | | |" in text
    assert "Self-test: all 1 checks passed." in text
    assert text.endswith(f"{gpu.END}\n\nMore.\n")
    assert gpu.NOT_MEASURED not in text


def test_document_without_marks_is_refused(tmp_path: Path) -> None:
    (tmp_path / "gpu.md").write_text("# GPUs\n")
    with pytest.raises(ValueError, match="lacks the lines"):
        gpu.write_tables(tmp_path / "gpu.md", "tables")


def test_failed_checks_are_named() -> None:
    report = {"checks": [{"name": "gradients", "state": "FAILED", "detail": "error 0.5"}]}
    assert "Self-test: FAILED: gradients (error 0.5)." in gpu.format_tables(H100 | {"selftest": report})


def test_measurement_that_fails_is_named_and_the_others_go_on(monkeypatch: pytest.MonkeyPatch) -> None:
    def run_out_of_memory(*arguments: object) -> dict[str, Any]:
        raise torch.OutOfMemoryError("CUDA out of memory")

    def fail(*arguments: object) -> dict[str, Any]:
        raise UserError("no such thing")

    monkeypatch.setattr(gpu, "measure_step", run_out_of_memory)
    for name in ("run_selftest", "run_reproducible", "measure_generation"):
        monkeypatch.setattr(gpu, name, fail)
    result = gpu.measure("cpu", 60, None)
    assert result["training"]["eager"] == "out of memory"
    assert result["selftest"] == result["training"]["reproducible"] == "no such thing"
    assert gpu.measure("cpu", -1, None)["training"]["eager"] == "out of time"


def test_setting_that_was_not_compiled_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    def measure_eagerly(*arguments: object) -> dict[str, Any]:
        logging.getLogger("gpt").warning("torch.compile does not work here (%s)", "no Triton")
        return FIGURES

    for name in ("run_selftest", "run_reproducible", "measure_generation"):
        monkeypatch.setattr(gpu, name, lambda *arguments: FIGURES)
    monkeypatch.setattr(gpu, "measure_step", measure_eagerly)
    figures = gpu.measure("cpu", 60, None)["training"]["eager"]
    row = gpu.format_tables(H100 | {"training": {"compiled": figures}})
    assert "| compiled; torch.compile does not work here (no Triton) | bfloat16 |" in row


def test_nanogpt_is_measured_by_its_own_program(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    commands: list[list[str]] = []
    output = "Compiling model...\n9 loss: 10.8\ntime per iteration: 131.0720ms, MFU: 32.33%\n"

    def launch(command: list[str], **options: Any) -> subprocess.CompletedProcess[str]:
        assert options["cwd"] == tmp_path
        commands.append(command)
        return subprocess.CompletedProcess(command, 0, output, "")

    monkeypatch.setattr(subprocess, "run", launch)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: True)
    assert gpu.run_nanogpt(tmp_path, "cuda", gpu.COMPILED, gpu.GPU_SIZE) == {"tokens_per_second": 250_000.0}
    assert {"--batch_size=32", "--block_size=1024", "--dtype=bfloat16", "--compile=True"} <= set(commands[0])
    with pytest.raises(UserError, match="add --nanogpt"):
        gpu.run_nanogpt(None, "cuda", gpu.EAGER, gpu.GPU_SIZE)
    with pytest.raises(UserError, match=r"benchmarks\.peers compares on a CPU"):
        gpu.run_nanogpt(tmp_path, "cpu", gpu.EAGER, gpu.GPU_SIZE)
