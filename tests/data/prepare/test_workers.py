import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import gpt
from gpt.configs.data_config import PreparationConfig
from gpt.data.manifest import read_corpus_manifest
from gpt.data.prepare import parts
from gpt.data.prepare.part_worker import ReadSettings
from gpt.data.prepare.preparation import prepare_folder
from gpt.data.prepare.preparation_plan import plan_preparation
from gpt.data.prepare.workers import WorkerPool
from tests.conftest import make_text, read_files

START = (
    "import sys, gpt.data.prepare.parts as parts; parts.PART_BYTES = 30_000; "
    "from gpt.main import main; sys.exit(main())"
)


@pytest.fixture(scope="module")
def lines(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("lines") / "lines.jsonl"
    with path.open("w") as file:
        for index in range(3000):
            file.write(json.dumps({"text": make_text(1000, seed=index % 2900)}) + "\n")
    return path


def start_preparation(lines: Path, out: Path) -> "subprocess.Popen[str]":
    command = [sys.executable, "-c", START, "prepare", str(lines), "--out", str(out)]
    flags = ["--workers", "2", "--tokenizer", "byte", "--deduplicate"]
    return subprocess.Popen(
        [*command, *flags], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, start_new_session=True
    )


def list_finished_shards(out: Path) -> dict[str, tuple[int, int]]:
    """Return the inode and time of each shard of the finished parts."""
    unfinished = out.with_name(f".{out.name}.unfinished")
    found = {}
    for record in unfinished.glob("parts/*.json"):
        for role in ("train", "val"):
            shard = unfinished / f"{role}-{record.stem}.safetensors"
            if shard.exists():
                found[shard.name] = (shard.stat().st_ino, shard.stat().st_mtime_ns)
    return found


def wait_for(condition: Callable[[], object], process: "subprocess.Popen[str]", seconds: float = 60) -> None:
    until = time.monotonic() + seconds
    while not condition():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < until
        time.sleep(0.002)


def list_children(pid: int) -> list[int]:
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="looks into /proc")
def test_preparation_resumes_after_any_kill(tmp_path: Path, lines: Path) -> None:
    out = tmp_path / "out"
    draw = random.Random(0)
    finished: dict[str, tuple[int, int]] = {}
    for kill in ("group", "group", "worker", "interrupt", "parent"):
        process = start_preparation(lines, out)
        if kill == "group" and not finished:
            wait_for((tmp_path / ".out.unfinished").exists, process)  # in the midst of looking for duplicates
        else:
            wanted = len(finished) + draw.randrange(1, 8)
            wait_for(lambda: len(list_finished_shards(out)) >= wanted, process)  # noqa: B023
        time.sleep(draw.random() / 30)
        workers = list_children(process.pid)
        if kill == "worker":
            os.kill(workers[0], signal.SIGKILL)
            _, error = process.communicate(timeout=20)
            assert process.returncode == 2
            assert error.endswith(f"or delete {tmp_path / '.out.unfinished'}\n")
            assert (
                f"--out {out}: a process that prepares data was killed by SIGKILL; run the same command again" in error
            )
            assert len(error.splitlines()) == 1
        elif kill == "interrupt":
            os.killpg(process.pid, signal.SIGINT)
            _, error = process.communicate(timeout=20)
            assert (process.returncode, error) == (130, "gpt: interrupted\n")
        else:
            os.killpg(process.pid, signal.SIGKILL) if kill == "group" else process.kill()
            process.communicate(timeout=20)
        until = time.monotonic() + 10
        while any(Path(f"/proc/{worker}/stat").exists() for worker in workers):  # none survives who started it
            assert time.monotonic() < until
            time.sleep(0.01)
        assert not out.exists()
        assert finished.items() <= list_finished_shards(out).items()
        finished = list_finished_shards(out)
    assert len(finished) > 0
    process = start_preparation(lines, out)
    _, error = process.communicate(timeout=120)
    assert (process.returncode, error) == (0, "")
    assert {name: ((out / name).stat().st_ino, (out / name).stat().st_mtime_ns) for name in finished} == finished
    uninterrupted = tmp_path / "whole"
    config = PreparationConfig(tokenizer="byte", workers=1, deduplicate=True)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(parts, "PART_BYTES", 30_000)
        prepare_folder(uninterrupted, plan_preparation([str(lines)], config), "--out")
    assert read_files(out) == read_files(uninterrupted)
    assert read_corpus_manifest(uninterrupted).sources[0].duplicates == 100


def test_worker_imports_no_torch() -> None:
    code = "import sys, gpt.data.prepare.workers; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_workers_are_started_with_the_root_of_this_package(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Check that a worker imports the code of the process that starts it, not an installed copy."""
    commands: list[list[str]] = []
    start = subprocess.Popen

    def spy(command: list[str], **options: Any) -> Any:
        commands.append(command)
        return start(command, **options)

    monkeypatch.setattr(subprocess, "Popen", spy)
    settings = ReadSettings("text", skip_bad=False, val_fraction=0.1, corpus_bytes=1, deduplicate=False)
    with WorkerPool(tmp_path, settings, 2):
        pass
    root = str(Path(gpt.__file__).parents[1])
    assert [command[-1] for command in commands] == [root, root]
