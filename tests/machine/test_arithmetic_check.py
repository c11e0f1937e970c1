import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from gpt.configs.gpt_config import GPTConfig
from gpt.errors import UserError
from gpt.machine import arithmetic_check
from gpt.machine.arithmetic_check import Matmul, find_wrong_matmul, list_matmuls, require_right_arithmetic

CPU = torch.device("cpu")
MODEL = GPTConfig(n_layer=2, n_head=4, n_embd=64, block_size=32, vocab_size=300).resolve()


def check(folder: Path, dtype: str = "bfloat16", rows: int = 256) -> None:
    require_right_arithmetic(CPU, "this CPU", dtype, MODEL, rows, folder)


def break_linear(monkeypatch: pytest.MonkeyPatch, spoil: Callable[[torch.Tensor], Any], dtype: torch.dtype) -> None:
    original = torch.nn.functional.linear

    def linear(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        out = original(x, weight)
        if out.dtype == dtype:
            spoil(out)
        return out

    monkeypatch.setattr(torch.nn.functional, "linear", linear)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_right_arithmetic_passes_and_is_cached(dtype: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    check(tmp_path, dtype)
    (record,) = tmp_path.iterdir()
    assert json.loads(record.read_text())["is_right"] is True
    monkeypatch.setattr(arithmetic_check, "find_wrong_matmul", lambda *_: pytest.fail("not cached"))
    check(tmp_path, dtype)


@pytest.mark.parametrize("name", ["OMP_THREAD_LIMIT", "ONEDNN_MAX_CPU_ISA", "LD_PRELOAD"])
def test_another_environment_is_checked_again(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    check(tmp_path)
    monkeypatch.setenv(name, "1")
    check(tmp_path)
    assert len(list(tmp_path.iterdir())) == 2


@pytest.mark.parametrize(
    "spoil",
    [
        lambda out: out.mul_(1.5),
        lambda out: out[-1:].zero_(),
        lambda out: out[:, -1:].fill_(float("nan")),
        lambda out: out[0, 0].fill_(1e30),
        lambda out: out[:, : out.shape[1] // 2].zero_(),
        lambda out: out.fill_(float("inf")),
    ],
)
def test_wrong_products_are_named_with_dtype_and_remedy_and_never_cached(
    spoil: Callable[[torch.Tensor], Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    break_linear(monkeypatch, spoil, torch.bfloat16)
    monkeypatch.setenv("OMP_THREAD_LIMIT", "1")
    for _ in range(2):
        with pytest.raises(UserError, match=r"^this machine multiplies wrongly on cpu in bfloat16 .*OMP_THREAD_LIMIT"):
            check(tmp_path)
    assert list(tmp_path.iterdir()) == []
    check(tmp_path, "float32")


def test_wrong_float32_is_found_in_a_bfloat16_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    break_linear(monkeypatch, lambda out: out.copy_(out.bfloat16()), torch.float32)
    with pytest.raises(UserError, match="on cpu in float32"):
        check(tmp_path)


def test_matmuls_are_those_of_all_linear_layers_and_bounded() -> None:
    large = GPTConfig(n_layer=1, n_head=16, n_embd=4096, block_size=32, vocab_size=100_000).resolve()
    shapes = list_matmuls(large, rows=100_000)
    assert max(max(shape) for shape in shapes) == arithmetic_check.MAX_SIZE
    assert {Matmul(256, 64, 192), Matmul(32, 64, 300), Matmul(300, 256, 64)} <= set(list_matmuls(MODEL, rows=256))


def test_check_ends_at_its_deadline() -> None:
    shapes = [Matmul(32, 2048, 2048)] * 2000
    start = time.perf_counter()
    assert find_wrong_matmul(CPU, torch.float32, shapes, deadline=start + 0.2) is None
    assert time.perf_counter() - start < 2.0


COMMAND = [
    *("train", "debug", "--device", "cpu", "--dtype", "bfloat16", "--model.n-embd", "128"),
    *("--model.block-size", "128", "--micro-batch-size", "8", "--tokens-per-step", "2048", "--max-steps", "3"),
    *("--eval.interval", "0", "--log.interval", "1", "--sample.max-new-tokens", "1"),
]


def train_losses(folder: Path, text: Path, cache: Path, *flags: str, **environment: str) -> list[float]:
    clean = {name: value for name, value in os.environ.items() if not name.startswith(("OMP_", "KMP_"))}
    data = ["--data.source", str(text), "--data.cache-dir", str(cache), "--run-dir", str(folder)]
    subprocess.run(
        [sys.executable, "-m", "gpt.main", *COMMAND, *data, *flags],
        env=clean | environment, check=True, capture_output=True, timeout=120,
    )  # fmt: skip
    records = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [record["train/loss"] for record in records if "train/loss" in record]


def test_run_trains_rightly_whatever_openmp_is_told(tmp_path: Path, text_file: Path, cache_dir: Path) -> None:
    one = train_losses(tmp_path / "one", text_file, cache_dir, "--runtime.threads", "1")
    for name, value in (("OMP_THREAD_LIMIT", "1"), ("OMP_MAX_ACTIVE_LEVELS", "0")):
        assert train_losses(tmp_path / name, text_file, cache_dir, **{name: value}) == one
    dynamic = train_losses(tmp_path / "dynamic", text_file, cache_dir, OMP_DYNAMIC="true")
    assert dynamic == pytest.approx(one, abs=0.02)
