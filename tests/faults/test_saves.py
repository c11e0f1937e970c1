"""Faults during a save: kills, disk errors and full disks. Committed checkpoints must survive all of them."""

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
WRITE_CALLS = "write,writev,pwrite64"
RENAME_CALLS = "rename,renameat,renameat2"
VARYING_CALLS = {"futex", "mmap", "munmap", "mprotect", "madvise", "brk", "rt_sigprocmask", "sched_yield"}
"""System calls that allocate memory or wait for a thread: each save makes another number of them."""


class SaveServer:
    """Client of `save_server.py` that attaches strace to the children that save."""

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
        """Commit checkpoints without faults."""
        for step in steps:
            self._send(make_request(run_dir, step, keep=0) | {"prepare": True})
            self._receive()

    def save(self, request: dict[str, Any], *strace: str) -> dict[str, Any]:
        """Save in a child, to which strace is attached if it has options, and return the server's answer."""
        self._send(request)
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
            pytest.skip(f"strace cannot attach to a process: {tracer.communicate()[1]}")
        time.sleep(0.001)


def make_request(
    run_dir: Path, step: int, *, keep: int, asynchronous: bool = False, resumed_at: int = 99
) -> dict[str, Any]:
    return {
        "run_dir": str(run_dir), "step": step, "keep": keep, "asynchronous": asynchronous, "resumed_at": resumed_at
    }  # fmt: skip


@pytest.fixture(scope="module")
def server() -> Iterator[SaveServer]:
    if shutil.which("strace") is None:
        pytest.skip("strace is not installed")
    with SaveServer() as save_server:
        yield save_server


@pytest.fixture
def committed(server: SaveServer, tmp_path: Path) -> Path:
    """Return the folder of a run with checkpoints 1 and 2."""
    server.prepare(tmp_path / "base", 1, 2)
    return tmp_path / "base"


def inject_into_each_call(
    server: SaveServer, base: Path, run_dir: Path, request: dict[str, Any], syscalls: str, fault: str
) -> Iterator[dict[str, Any]]:
    """Yield the outcome of a save whose k-th system call of a kind fails, for all k."""
    for k in count(1):
        shutil.copytree(base, run_dir)
        outcome = server.save(request | {"run_dir": str(run_dir)}, "-e", f"inject={syscalls}:{fault}:when={k}")
        shutil.rmtree(run_dir)
        assert outcome["retry_error"] is None
        if outcome["status"] == 0:  # the save has fewer than k such calls
            assert k > 1
            return
        yield outcome


def list_system_calls(server: SaveServer, base: Path, run_dir: Path, request: dict[str, Any]) -> list[tuple[str, int]]:
    """Return each system call of a save as its name and its ordinal among its thread's calls of that name.

    This is how strace counts them. The call that the child is in when strace attaches is left out.
    """
    shutil.copytree(base, run_dir)
    trace = run_dir / "trace"
    server.save(request | {"run_dir": str(run_dir)}, "-s", "0", "-o", str(trace))
    calls_by_thread = re.findall(r"^(\d+) +(\w+)\(", trace.read_text(), re.MULTILINE)[1:]
    shutil.rmtree(run_dir)
    counts: Counter[tuple[str, str]] = Counter()
    calls = []
    for call in calls_by_thread:
        counts[call] += 1
        calls.append((call[1], counts[call]))
    return list(dict.fromkeys(calls))


def kill_at_each_call(
    server: SaveServer, base: Path, run_dir: Path, request: dict[str, Any], *, min_calls: int = 60
) -> Iterator[list[int] | str]:
    """Yield the steps of the valid checkpoints after a save is killed at each of its system calls, in their order."""
    calls = list_system_calls(server, base, run_dir, request)
    missed = []
    for name, k in calls:
        shutil.copytree(base, run_dir)
        outcome = server.save(request | {"run_dir": str(run_dir)}, "-e", f"inject={name}:signal=KILL:when={k}")
        shutil.rmtree(run_dir)
        assert outcome["status"] in (-9, 0), outcome
        assert outcome["retry_error"] is None
        if outcome["status"] == 0 and name not in VARYING_CALLS:
            missed.append((name, k))
        yield outcome["valid_steps"]
    n_steady = sum(name not in VARYING_CALLS for name, _ in calls)
    assert n_steady > min_calls
    assert len(missed) <= 0.05 * n_steady  # which thread makes a call varies, and ordinals are counted per thread


@pytest.mark.parametrize("asynchronous", [False, True])
def test_save_killed_at_any_system_call_leaves_valid_checkpoints(
    server: SaveServer, committed: Path, tmp_path: Path, asynchronous: bool
) -> None:
    """Kill during pruning too: two of the checkpoints 1, 2 and 3 are kept."""
    request = make_request(tmp_path, 3, keep=2, asynchronous=asynchronous)
    states = list(kill_at_each_call(server, committed, tmp_path / "run", request))
    phases = [[1, 2], [1, 2, 3], [2, 3]]
    assert all(state in phases for state in states), states
    assert all(phase in states for phase in phases)


def test_second_save_of_a_step_killed_at_any_system_call_leaves_valid_checkpoints(
    server: SaveServer, committed: Path, tmp_path: Path
) -> None:
    request = make_request(tmp_path, 2, keep=0)
    # A save of a committed step only verifies it, so it makes fewer calls.
    states = list(kill_at_each_call(server, committed, tmp_path / "run", request, min_calls=40))
    assert all(state == [1, 2] for state in states), states


def test_save_over_a_damaged_checkpoint_killed_at_any_system_call_is_never_a_mixture(
    server: SaveServer, committed: Path, tmp_path: Path
) -> None:
    weights = committed / "checkpoints/step_00000002/model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"\xff")
    for state in kill_at_each_call(server, committed, tmp_path / "run", make_request(tmp_path, 2, keep=0)):
        damaged = isinstance(state, str) and "step_00000002/model.safetensors: damaged" in state
        assert damaged or state in ([1], [1, 2]), state


@pytest.mark.parametrize(
    ("syscalls", "error", "cause"),
    [
        (WRITE_CALLS, "ENOSPC", "No space left on device; lower --checkpoint.keep or free space"),
        (WRITE_CALLS, "EIO", "Input/output error; the disk fails"),
        ("fsync", "EIO", "Input/output error; the disk fails"),
        ("fsync", "ENOSPC", "No space left on device; lower"),
        (RENAME_CALLS, "EIO", "Input/output error; the disk fails"),
        (RENAME_CALLS, "ENOSPC", "No space left on device; lower"),
        ("mkdir", "ENOSPC", "No space left on device; lower"),
        ("mkdir", "EROFS", "Read-only file system; mount the disk writable"),
    ],
)
@pytest.mark.parametrize("asynchronous", [False, True])
def test_disk_error_during_a_save_is_one_line_and_keeps_the_last_commit(
    server: SaveServer, committed: Path, tmp_path: Path, asynchronous: bool, syscalls: str, error: str, cause: str
) -> None:
    request = make_request(tmp_path, 3, keep=2, asynchronous=asynchronous)
    outcomes = list(inject_into_each_call(server, committed, tmp_path / "run", request, syscalls, f"error={error}"))
    assert len(outcomes) >= {"mkdir": 1, RENAME_CALLS: 2, "fsync": 7, WRITE_CALLS: 5}[syscalls]
    for outcome in outcomes:
        assert outcome["status"] == 2
        assert re.search(
            rf"/step_|/\.step_|/checkpoints: the checkpoint of step 3 cannot be saved: {cause}", outcome["error"]
        )
        assert cause in outcome["error"]
        assert "\n" not in outcome["error"]
        assert outcome["valid_steps"] in ([1, 2], [1, 2, 3], [2, 3])
        assert not [name for name in outcome["entries"] if name.endswith(".tmp")]


def test_file_size_limit_is_one_line_and_keeps_the_last_commit(
    server: SaveServer, committed: Path, tmp_path: Path
) -> None:
    max_bytes = max(file.stat().st_size for file in committed.rglob("*.safetensors"))
    for limit in (0, 100, 1000, max_bytes // 2, max_bytes - 1):
        shutil.copytree(committed, tmp_path / "run")
        outcome = server.save(make_request(tmp_path / "run", 3, keep=2) | {"max_file_bytes": limit})
        shutil.rmtree(tmp_path / "run")
        assert outcome["status"] == 2
        assert "File too large; raise the limit on the size of files (ulimit -f)" in outcome["error"]
        assert outcome["valid_steps"] == [1, 2]
        assert not [name for name in outcome["entries"] if name.startswith(".")]


def test_full_disk_names_the_bytes_needed_and_keeps_the_last_commit(tmp_path: Path) -> None:
    """Save to a tmpfs with room for one and a half checkpoints, in a mount namespace of the server's own."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["unshare", "-rm", "sh", "-c", 'mount -t tmpfs -o size="$0" tmpfs "$1" && shift && exec "$@"']
    has_unshare = shutil.which("unshare") is not None
    if not has_unshare or subprocess.run([*mount, "64k", disk, "true"], capture_output=True).returncode != 0:
        pytest.skip("needs unshare and the right to mount a tmpfs")
    with SaveServer(*mount, "15m", str(disk), width=256) as server:  # a checkpoint takes 9.5 MB
        server.prepare(disk / "run", 1)
        outcome = server.save(make_request(disk / "run", 2, keep=1, asynchronous=True))
    assert outcome["status"] == 2
    assert re.search(
        r"the checkpoint of step 2 needs 10.*MB, but only 6.*MB are free on .*/checkpoints; lower", outcome["error"]
    )
    assert "lower --checkpoint.keep or free space" in outcome["error"]
    assert outcome["valid_steps"] == [1]
    assert outcome["entries"] == ["step_00000001"]


def test_files_are_synced_before_their_folder_is_renamed(server: SaveServer, committed: Path, tmp_path: Path) -> None:
    """Check the order of system calls: at a power loss a file system may drop whatever was not synced, in any order."""
    trace = tmp_path / "trace"
    outcome = server.save(
        make_request(committed, 3, keep=2), "-y", "-s", "0", "-o", str(trace),
        "-e", f"trace={WRITE_CALLS},fsync,{RENAME_CALLS},unlink,unlinkat",
    )  # fmt: skip
    assert outcome["status"] == 0
    calls = [line for line in trace.read_text().splitlines() if "checkpoints" in line]
    temporary, final = ".step_00000003.tmp", "step_00000003"

    def find_all(pattern: str) -> list[int]:
        return [index for index, line in enumerate(calls) if re.search(pattern, line)]

    def find_last(pattern: str, before: int = len(calls)) -> int:
        return max(index for index in find_all(pattern) if index < before)

    def find_first(pattern: str) -> int:
        return min(find_all(pattern))

    files = ["model.safetensors", "optimizer.safetensors", "progress.json", "config.json", "manifest.json"]
    written = [find_last(rf"write\(\d+<[^>]*/{temporary}/{file}>") for file in files]
    synced = [find_last(rf"fsync\(\d+<[^>]*/{temporary}/{file}>\)") for file in files]
    assert all(before < after for before, after in zip(written, synced, strict=True))
    folder_synced = find_last(rf"fsync\(\d+<[^>]*/{temporary}>\)")
    renamed = find_last(rf'rename\("[^"]*/{temporary}", "[^"]*/{final}"\)')
    parent_synced = find_last(r"fsync\(\d+<[^>]*/checkpoints>", before=find_last(r"rename.*00001.gone"))
    pruned = find_last(r'rename\("[^"]*/step_00000001", "[^"]*/\.step_00000001\.gone"\)')
    prune_synced = find_last(r"fsync\(\d+<[^>]*/checkpoints>")
    deleted = find_first(r"unlink.*(model|manifest)")
    assert max(synced) < folder_synced < renamed < parent_synced < pruned < prune_synced < deleted


def test_new_folder_is_synced_before_anything_is_written_into_it(server: SaveServer, tmp_path: Path) -> None:
    trace = tmp_path / "trace"
    server.save(make_request(tmp_path / "new" / "run", 1, keep=0), "-y", "-o", str(trace), "-e", "trace=mkdir,fsync")
    calls = [re.sub(r"^\d+ +", "", line) for line in trace.read_text().splitlines()]
    for folder in (tmp_path / "new", tmp_path / "new/run", tmp_path / "new/run/checkpoints"):
        created = next(index for index, line in enumerate(calls) if line.startswith(f'mkdir("{folder}"'))
        assert f"<{folder.parent}>) = 0" in calls[created + 1]
