"""Heartbeats of two ranks in one process."""

import json
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch.distributed as dist

from gpt.utils import heartbeat as module
from gpt.utils.flight_recorder import RECORD_PREFIX, FlightRecorder
from gpt.utils.hang import Limits, Progress
from gpt.utils.heartbeat import Heartbeat

WAITS = Limits("hangs", silence=0.6, stall=0.6)


class Ended(BaseException):
    """Takes the place of the end of the process."""


@pytest.fixture
def ends(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Any]]:
    """Record messages and exit statuses, and end the judging thread where the process would end."""
    recorded: list[Any] = []

    def leave(status: int) -> None:
        recorded.append(status)
        raise Ended

    monkeypatch.setattr(module, "leave", leave)
    monkeypatch.setattr(module, "write_error", recorded.append)
    monkeypatch.setattr(module, "VERDICT_SECONDS", 0.2)
    monkeypatch.setattr(module, "MIN_INTERVAL_SECONDS", 0.05)
    monkeypatch.setattr(threading, "excepthook", lambda arguments: None)
    yield recorded


@pytest.fixture
def start(ends: list[Any]) -> Iterator[Callable[..., Heartbeat]]:
    """Return a function that starts the heartbeat of a rank; all share a store."""
    store, started = dist.HashStore(), list[Heartbeat]()

    def start_heartbeat(rank: int, **settings: Any) -> Heartbeat:
        started.append(Heartbeat(store, rank, 2, timeout=1.0, waits_idle=False, **settings))
        return started[-1]

    yield start_heartbeat
    for heartbeat in started:
        heartbeat.stop()
        wait_until(lambda heartbeat=heartbeat: not any(thread.is_alive() for thread in heartbeat._threads))  # type: ignore[misc]


def wait_until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_silent_rank_is_reported_once_and_ends_all_ranks(start: Callable[..., Heartbeat], ends: list[Any]) -> None:
    first, second = start(0), start(1)
    wait_until(lambda: len(first._sightings) == 2 and len(second._sightings) == 1)
    with first.watching(WAITS):
        time.sleep(1)
        assert ends == []
        second.stop()
        wait_until(lambda: bool(ends))
        third = start(1)  # a rank that reads the verdict
        wait_until(lambda: len(ends) == 3)
    assert ends[0].startswith("gpt: error: rank 1 hangs; rank 1: the process is stopped, or its machine is gone; ")
    assert ends[1:] == [2, 2]
    assert third.verdict == first.verdict != ""


@pytest.mark.parametrize("waits", [True, False])
def test_blocked_rank_is_reported_only_in_a_step(
    waits: bool, start: Callable[..., Heartbeat], ends: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Limits, "for_steps", lambda timeout: Limits("hangs", silence=5.0, stall=1.2))
    first, second = start(0), start(1)
    for heartbeat, step in ((first, 7), (second, 6)):
        heartbeat.start_training(lambda step=step: Progress(step, 1, in_step=waits))  # type: ignore[misc]
    if waits:
        wait_until(lambda: bool(ends))
        assert ends[0].startswith("gpt: error: rank 1 hangs; rank 1 waits in step 7 at ")
        assert "; rank 0 waits in step 8 at " in ends[0]
    else:
        time.sleep(2)
        assert ends == []


def test_rank_that_reports_a_failed_collective_judges_no_more(start: Callable[..., Heartbeat], ends: list[Any]) -> None:
    first, second = start(0), start(1)
    wait_until(lambda: len(first._sightings) == 2)
    first.start_training(lambda: Progress(1, 1, in_step=True))
    first.report_failure()
    second.stop()
    wait_until(lambda: first.is_silent(1))
    with first.watching(WAITS):
        time.sleep(1)
    assert ends == []
    assert first.is_stuck(1)
    assert not first.is_silent(0)


def test_suspended_process_does_not_take_others_for_silent(
    start: Callable[..., Heartbeat], ends: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Let the clock jump by 100 s, as it does for a process that was stopped and goes on."""
    jump = [0.0]
    clock = SimpleNamespace(monotonic=lambda: time.monotonic() + jump[0], sleep=time.sleep)
    monkeypatch.setattr(module, "time", clock)
    first, second = start(0), start(1)
    wait_until(lambda: len(first._sightings) == 2)
    with first.watching(WAITS):
        jump[0] = 100.0
        time.sleep(0.5)
        assert ends == []
        second.stop()
        wait_until(lambda: bool(ends))


def test_flight_record_is_written_and_named(
    start: Callable[..., Heartbeat], ends: list[Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("TORCH_FR_BUFFER_SIZE", "TORCH_FR_DUMP_TEMP_FILE", "TORCH_NCCL_DEBUG_INFO_TEMP_FILE"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)
    monkeypatch.setenv("TORCH_NCCL_DUMP_ON_TIMEOUT", "1")
    recorder = FlightRecorder(tmp_path, 0)
    first, second = start(0, recorder=recorder), start(1)
    wait_until(lambda: len(first._sightings) == 2)
    second.stop()
    with first.watching(WAITS):
        wait_until(lambda: len(ends) == 2)
    assert ends[0].endswith(f"; {tmp_path / RECORD_PREFIX}* hold the last collectives of each rank")
    assert (tmp_path / f"{RECORD_PREFIX}0").stat().st_size > 0


ENDS_SCRIPT = """
import os, signal, sys, threading
import torch.distributed as dist
from gpt.utils.heartbeat import Heartbeat
from gpt.utils.launch import end_process

store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
heartbeat = Heartbeat(store.clone(), 0, 1, timeout=600, waits_idle=True)
assert sum(thread.name.startswith("heartbeat") for thread in threading.enumerate()) == 2
exec(sys.argv[1])
"""


@pytest.mark.parametrize(
    ("end", "status"),
    [
        ("pass", 0),
        ("raise SystemExit(3)", 3),
        ("raise ValueError", 1),
        ("raise KeyboardInterrupt", -2),
        ("os._exit(4)", 4),
        ("end_process(5)", 5),
        ("os.kill(os.getpid(), signal.SIGTERM); signal.pause()", -15),
    ],
)
def test_threads_end_with_the_process(end: str, status: int) -> None:
    process = subprocess.run([sys.executable, "-c", ENDS_SCRIPT, end], capture_output=True, text=True, timeout=60)
    assert process.returncode == status, process.stderr
    assert "Fatal" not in process.stderr
    assert json.dumps(process.stdout) == '""'
