"""Faults during a save: kills, a disk that refuses or is full. What was committed before must still be there."""

import json
import os
import re
import shutil
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from itertools import count
from pathlib import Path
from typing import Any, Self

import pytest

pytestmark = pytest.mark.faults

REPOSITORY = Path(__file__).resolve().parents[2]
WRITING = "write,writev,pwrite64"
RENAMING = "rename,renameat,renameat2"


class SaveServer:
    """`save_server.py`, and strace at its children."""

    def __init__(self, *prefix: str, width: int = 8):
        self._process = subprocess.Popen(
            [*prefix, sys.executable, "-m", "tests.faults.save_server", str(width)],
            cwd=REPOSITORY,
            env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(REPOSITORY)},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        assert self._receive() == "ready"

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        assert self._process.stdin and self._process.stdout
        self._process.stdin.close()
        self._process.wait(timeout=20)
        self._process.stdout.close()

    def prepare(self, run_dir: Path, *steps: int) -> None:
        """Commit checkpoints, without faults."""
        for step in steps:
            self._send(order(run_dir, step, keep=0) | {"prepare": True})
            self._receive()

    def save(self, wanted: dict[str, Any], *strace: str) -> dict[str, Any]:
        """Save in a child, with strace attached if there is something for it to do."""
        self._send(wanted)
        child = self._receive()
        tracer = None
        if strace:
            tracer = subprocess.Popen(["strace", "-f", "-p", str(child), *strace], stderr=subprocess.PIPE, text=True)
            _wait_until_traced(child, tracer)
        self._send("go")
        answer: dict[str, Any] = self._receive()
        if tracer:
            tracer.communicate(timeout=20)
        return answer

    def _send(self, value: Any) -> None:
        assert self._process.stdin
        self._process.stdin.write(json.dumps(value) + "\n")
        self._process.stdin.flush()

    def _receive(self) -> Any:
        assert self._process.stdout
        line = self._process.stdout.readline()
        assert line, "the server died"
        return json.loads(line)


def _wait_until_traced(pid: int, tracer: "subprocess.Popen[str]") -> None:
    deadline = time.monotonic() + 10
    while "TracerPid:\t0\n" in Path(f"/proc/{pid}/status").read_text():
        if tracer.poll() is not None or time.monotonic() > deadline:
            pytest.skip(f"strace cannot attach here: {tracer.communicate()[1]}")
        time.sleep(0.001)


def order(run_dir: Path, step: int, *, keep: int, asynchronous: bool = False, resumed_at: int = 99) -> dict[str, Any]:
    return {
        "run_dir": str(run_dir), "step": step, "keep": keep, "asynchronous": asynchronous, "resumed_at": resumed_at
    }  # fmt: skip


@pytest.fixture(scope="module")
def server() -> Iterator[SaveServer]:
    if shutil.which("strace") is None:
        pytest.skip("strace is not installed")
    with SaveServer() as started:
        yield started


@pytest.fixture
def committed(server: SaveServer, tmp_path: Path) -> Path:
    """A run with checkpoints 1 and 2."""
    server.prepare(tmp_path / "base", 1, 2)
    return tmp_path / "base"


def each(
    server: SaveServer, base: Path, run_dir: Path, wanted: dict[str, Any], syscalls: str, fault: str
) -> Iterator[dict[str, Any]]:
    """What becomes of a save whose k-th system call meets a fault, for all k."""
    for k in count(1):
        shutil.copytree(base, run_dir)
        outcome = server.save(wanted | {"run_dir": str(run_dir)}, "-e", f"inject={syscalls}:{fault}:when={k}")
        shutil.rmtree(run_dir)
        assert outcome["again"] is None
        if outcome["status"] == 0:  # there is no k-th
            assert k > 1
            return
        yield outcome


def system_calls(server: SaveServer, base: Path, run_dir: Path, wanted: dict[str, Any]) -> list[tuple[str, int]]:
    """Every system call of a save: its name, and the how manieth of that name it is in its thread.

    So strace counts them. The first one, which the child is in when strace attaches, is not among them.
    """
    shutil.copytree(base, run_dir)
    trace = run_dir / "trace"
    server.save(wanted | {"run_dir": str(run_dir)}, "-s", "0", "-o", str(trace))
    begun = re.findall(r"^(\d+) +(\w+)\(", trace.read_text(), re.MULTILINE)[1:]
    shutil.rmtree(run_dir)
    seen: Counter[tuple[str, str]] = Counter()
    calls = []
    for call in begun:
        seen[call] += 1
        calls.append((call[1], seen[call]))
    return list(dict.fromkeys(calls))


def killed_at_each(server: SaveServer, base: Path, run_dir: Path, wanted: dict[str, Any]) -> Iterator[list[int] | str]:
    """What is left, in the order of the calls, when a save is killed as it enters each of its system calls."""
    calls = system_calls(server, base, run_dir, wanted)
    killed = 0
    for name, k in calls:
        shutil.copytree(base, run_dir)
        outcome = server.save(wanted | {"run_dir": str(run_dir)}, "-e", f"inject={name}:signal=KILL:when={k}")
        shutil.rmtree(run_dir)
        assert outcome["status"] in (-9, 0), outcome
        assert outcome["again"] is None
        killed += outcome["status"] == -9
        yield outcome["sound"]
    # Memory is asked for, and threads wait, not always as often.
    assert killed >= 0.9 * len(calls) > 100


@pytest.mark.parametrize("asynchronous", [False, True])
def test_a_save_that_is_killed_at_any_system_call(
    server: SaveServer, committed: Path, tmp_path: Path, asynchronous: bool
) -> None:
    """Pruning included: of 1, 2 and 3 two are kept."""
    wanted = order(tmp_path, 3, keep=2, asynchronous=asynchronous)
    states = list(killed_at_each(server, committed, tmp_path / "run", wanted))
    phases = [[1, 2], [1, 2, 3], [2, 3]]
    assert all(state in phases for state in states), states
    assert all(phase in states for phase in phases)


def test_a_save_of_a_committed_step_that_is_killed_at_any_system_call(
    server: SaveServer, committed: Path, tmp_path: Path
) -> None:
    wanted = order(tmp_path, 2, keep=0)
    assert all(state == [1, 2] for state in killed_at_each(server, committed, tmp_path / "run", wanted))


def test_a_save_in_place_of_a_damaged_one_that_is_killed_at_any_system_call(
    server: SaveServer, committed: Path, tmp_path: Path
) -> None:
    weights = committed / "checkpoints/step_00000002/model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"\xff")
    for state in killed_at_each(server, committed, tmp_path / "run", order(tmp_path, 2, keep=0)):
        damaged = isinstance(state, str) and "step_00000002/model.safetensors: damaged" in state
        assert damaged or state in ([1], [1, 2]), state


@pytest.mark.parametrize(
    ("syscalls", "error", "cause"),
    [
        (WRITING, "ENOSPC", "No space left on device; lower --checkpoint.keep or free space"),
        (WRITING, "EIO", "Input/output error; the disk fails"),
        ("fsync", "EIO", "Input/output error; the disk fails"),
        ("fsync", "ENOSPC", "No space left on device; lower"),
        (RENAMING, "EIO", "Input/output error; the disk fails"),
        (RENAMING, "ENOSPC", "No space left on device; lower"),
        ("mkdir", "ENOSPC", "No space left on device; lower"),
        ("mkdir", "EROFS", "Read-only file system; mount the disk writable"),
    ],
)
@pytest.mark.parametrize("asynchronous", [False, True])
def test_a_disk_that_refuses(
    server: SaveServer, committed: Path, tmp_path: Path, asynchronous: bool, syscalls: str, error: str, cause: str
) -> None:
    wanted = order(tmp_path, 3, keep=2, asynchronous=asynchronous)
    outcomes = list(each(server, committed, tmp_path / "run", wanted, syscalls, f"error={error}"))
    assert len(outcomes) >= {"mkdir": 1, RENAMING: 2, "fsync": 7, WRITING: 5}[syscalls]
    for outcome in outcomes:
        assert outcome["status"] == 2
        assert re.search(
            rf"/step_|/\.step_|/checkpoints: the checkpoint of step 3 cannot be saved: {cause}", outcome["told"]
        )
        assert cause in outcome["told"]
        assert "\n" not in outcome["told"]
        assert outcome["sound"] in ([1, 2], [1, 2, 3], [2, 3])
        assert not [name for name in outcome["left"] if name.endswith(".tmp")]


def test_a_limit_on_the_size_of_files(server: SaveServer, committed: Path, tmp_path: Path) -> None:
    largest = max(file.stat().st_size for file in committed.rglob("*.safetensors"))
    for limit in (0, 100, 1000, largest // 2, largest - 1):
        shutil.copytree(committed, tmp_path / "run")
        outcome = server.save(order(tmp_path / "run", 3, keep=2) | {"largest_file": limit})
        shutil.rmtree(tmp_path / "run")
        assert outcome["status"] == 2
        assert "File too large; raise the limit on the size of files (ulimit -f)" in outcome["told"]
        assert outcome["sound"] == [1, 2]
        assert not [name for name in outcome["left"] if name.startswith(".")]


def test_a_disk_of_one_and_a_half_checkpoints(tmp_path: Path) -> None:
    """A tmpfs in a mount namespace of the server's own, which ends with it."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["unshare", "-rm", "sh", "-c", 'mount -t tmpfs -o size="$0" tmpfs "$1" && shift && exec "$@"']
    can = shutil.which("unshare") and subprocess.run([*mount, "64k", disk, "true"], capture_output=True).returncode == 0
    if not can:
        pytest.skip("no tmpfs may be mounted here")
    with SaveServer(*mount, "15m", str(disk), width=256) as server:  # a checkpoint takes 9.5 MB
        server.prepare(disk / "run", 1)
        outcome = server.save(order(disk / "run", 2, keep=1, asynchronous=True))
    assert outcome["status"] == 2
    assert re.search(r"the checkpoint of step 2 needs 10.*MB, 6.*MB free on .*/checkpoints; lower", outcome["told"])
    assert "lower --checkpoint.keep or free space" in outcome["told"]
    assert outcome["sound"] == [1]
    assert outcome["left"] == ["step_00000001"]


def test_everything_is_on_the_disk_before_it_has_its_name(server: SaveServer, committed: Path, tmp_path: Path) -> None:
    """What a power failure leaves: a file system may drop whatever was not forced to the disk, and in any order."""
    trace = tmp_path / "trace"
    outcome = server.save(
        order(committed, 3, keep=2), "-y", "-s", "0", "-o", str(trace),
        "-e", f"trace={WRITING},fsync,{RENAMING},unlink,unlinkat",
    )  # fmt: skip
    assert outcome["status"] == 0
    calls = [line for line in trace.read_text().splitlines() if "checkpoints" in line]
    temporary, final = ".step_00000003.tmp", "step_00000003"

    def places(pattern: str) -> list[int]:
        return [at for at, line in enumerate(calls) if re.search(pattern, line)]

    def last(pattern: str, before: int = len(calls)) -> int:
        return max(at for at in places(pattern) if at < before)

    def first(pattern: str) -> int:
        return min(places(pattern))

    files = ["model.safetensors", "optimizer.safetensors", "progress.json", "config.json", "manifest.json"]
    written = [last(rf"write\(\d+<[^>]*/{temporary}/{file}>") for file in files]
    synced = [last(rf"fsync\(\d+<[^>]*/{temporary}/{file}>\)") for file in files]
    assert all(before < after for before, after in zip(written, synced, strict=True))
    folder_synced = last(rf"fsync\(\d+<[^>]*/{temporary}>\)")
    named = last(rf'rename\("[^"]*/{temporary}", "[^"]*/{final}"\)')
    parent_synced = last(r"fsync\(\d+<[^>]*/checkpoints>", before=last(r"rename.*00001.gone"))
    pruned = last(r'rename\("[^"]*/step_00000001", "[^"]*/\.step_00000001\.gone"\)')
    unnamed = last(r"fsync\(\d+<[^>]*/checkpoints>")
    deleted = first(r"unlink.*(model|manifest)")
    assert max(synced) < folder_synced < named < parent_synced < pruned < unnamed < deleted


def test_a_folder_is_on_the_disk_before_anything_is_put_into_it(server: SaveServer, tmp_path: Path) -> None:
    trace = tmp_path / "trace"
    server.save(order(tmp_path / "new" / "run", 1, keep=0), "-y", "-o", str(trace), "-e", "trace=mkdir,fsync")
    calls = [re.sub(r"^\d+ +", "", line) for line in trace.read_text().splitlines()]
    for folder in (tmp_path / "new", tmp_path / "new/run", tmp_path / "new/run/checkpoints"):
        made = next(at for at, line in enumerate(calls) if line.startswith(f'mkdir("{folder}"'))
        assert f"<{folder.parent}>) = 0" in calls[made + 1]
