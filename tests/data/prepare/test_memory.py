import logging
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from gpt.configs.data_config import PreparationConfig
from gpt.data.prepare import memory, preparation_plan
from gpt.data.prepare.memory import PROCESS_BYTES, estimate_memory
from gpt.data.prepare.preparation_plan import PreparationPlan, plan_preparation
from tests.data.prepare.prepared import prepare

MIB = 2**20


def plan(path: Path, **settings: Any) -> PreparationPlan:
    return plan_preparation([str(path)], PreparationConfig(**{"tokenizer": "byte", "workers": 1, **settings}))


def write_sparse(path: Path, size: int) -> Path:
    """Write a text of a size that takes no room on the disk."""
    path.write_bytes(b"{}" if path.suffix == ".jsonl" else b"a text")
    os.truncate(path, size)
    return path


@pytest.fixture(autouse=True)
def no_digests(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("gpt.data.prepare.file_state.sha256_of_file", lambda path: "00" * 32)


def test_memory_does_not_grow_with_a_text_but_with_workers(tmp_path: Path) -> None:
    small, large = (write_sparse(tmp_path / f"{size}.txt", size * MIB) for size in (50, 500))
    assert estimate_memory(plan(small)) == estimate_memory(plan(large)) < 120 * MIB
    assert estimate_memory(plan(large, workers=4)) > 3 * estimate_memory(plan(large))
    assert plan(small, workers=4096).n_processes == 13  # one for each part


def test_memory_grows_with_a_compressed_text_which_is_one_document(tmp_path: Path) -> None:
    compressed = write_sparse(tmp_path / "a.txt.zst", 50 * MIB)
    assert estimate_memory(plan(compressed)) > 50 * MIB + PROCESS_BYTES


def test_memory_of_a_learned_tokenizer_is_that_of_its_sample(tmp_path: Path) -> None:
    text = write_sparse(tmp_path / "a.txt", 500 * MIB)
    assert estimate_memory(plan(text, tokenizer="bpe")) > estimate_memory(plan(text)) + 128 * MIB


@pytest.mark.parametrize(
    ("free", "workers", "level", "end"),
    [
        (None, 1, logging.INFO, "with 1 worker"),
        (2**34, 2, logging.INFO, "with 2 workers, of 17.2 GB free"),
        (2**27, 2, logging.WARNING, "with 2 workers, and 134 MB are free; lower --data.workers"),
        (2**26, 1, logging.WARNING, "with 1 worker, and 67.1 MB are free; give the process more"),
    ],
)
def test_preparation_reports_its_memory(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    free: int | None,
    workers: int,
    level: int,
    end: str,
) -> None:
    caplog.set_level(logging.INFO)
    monkeypatch.setattr(memory, "find_free_host_memory", lambda: free)
    monkeypatch.setattr(preparation_plan, "PART_BYTES", 100)
    (tmp_path / "a.txt").write_text("a text " * 100)
    prepare(tmp_path / "out", [tmp_path / "a.txt"], workers=workers)
    (record,) = [record for record in caplog.records if "of memory" in record.getMessage()]
    assert (record.levelno, record.getMessage().endswith(end)) == (level, True)


@pytest.mark.skipif(sys.platform != "linux", reason="needs /proc")
def test_estimate_is_near_the_memory_of_a_process(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_text("some words of a text\n" * 10**6)
    program = (
        "import sys; from pathlib import Path; from gpt.main import main; main(sys.argv[1:]); "
        "print(Path('/proc/self/status').read_text().partition('VmHWM:')[2].split()[0])"
    )
    argv = ["prepare", str(path), "--tokenizer", "byte", "--workers", "1", "--out", str(tmp_path / "out")]
    shown = subprocess.run([sys.executable, "-c", program, *argv], capture_output=True, text=True, check=True).stdout
    peak_bytes = 1024 * int(shown.splitlines()[-1])
    assert estimate_memory(plan(path)) / 2 < peak_bytes < 1.5 * estimate_memory(plan(path))
