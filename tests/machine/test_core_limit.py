import os
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from gpt.machine import core_limit
from gpt.machine.core_limit import TICKS_PER_SECOND, CoreLimit, CoreUsage, choose_core_count, read_busy_seconds

needs_affinity = pytest.mark.skipif(
    not hasattr(os, "sched_setaffinity") or len(os.sched_getaffinity(0)) < 2, reason="needs Linux and two cores"
)


@pytest.mark.parametrize(
    ("cores", "others", "threads", "expected"),
    [
        (2, 0.0, 2, 2),  # quiet
        (2, 0.4, 2, 2),
        (2, 1.0, 2, 1),  # one program
        (2, 0.7, 2, 1),  # the program while the threads are beside it
        (2, 1.6, 2, 1),  # no core is free
        (8, 7.9, 8, 1),
        (4, 2.0, 4, 2),
        (4, 1.0, 4, 4),  # three cores do not divide four threads evenly
        (4, 1.0, 2, 4),  # enough cores are free
    ],
)
def test_threads_run_on_free_cores_that_divide_them_evenly(
    cores: int, others: float, threads: int, expected: int
) -> None:
    assert choose_core_count(cores, others, threads) == expected


@pytest.mark.parametrize(("niceness", "ticks"), [(0, 140), (-5, 140), (5, 160)])
def test_busy_seconds_leave_out_idle_time_and_programs_of_low_priority(
    niceness: int, ticks: int, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    stat = tmp_path / "stat"
    stat.write_text("cpu  9 9 9 9 9 9 9 9 9 9\ncpu0 100 20 30 900 50 1 2 7 5 5\ncpu11 1 0 0 0 0 0 0 0 0 0\nintr 5\n")
    monkeypatch.setattr(core_limit, "CORE_TIMES", stat)
    monkeypatch.setattr(os, "getpriority", lambda *_: niceness)
    assert read_busy_seconds() == {0: ticks / TICKS_PER_SECOND, 11: 1 / TICKS_PER_SECOND}
    monkeypatch.setattr(core_limit, "CORE_TIMES", tmp_path / "missing")
    assert read_busy_seconds() == {}


@pytest.fixture
def idle_thread() -> Iterator[int]:
    ended = threading.Event()
    thread = threading.Thread(target=ended.wait)
    thread.start()
    yield thread.native_id or 0
    ended.set()
    thread.join()


@needs_affinity
def test_limit_follows_other_programs_and_is_lifted(idle_thread: int) -> None:
    cores = os.sched_getaffinity(idle_thread)
    n_free = len(cores) // 2
    limit = CoreLimit(threads=2 * n_free)
    limit.update([2**22 + 1, idle_thread], others=len(cores) - n_free)  # no thread has the first id
    assert len(os.sched_getaffinity(idle_thread)) == n_free
    limit.update([idle_thread], others=0.0)
    assert os.sched_getaffinity(idle_thread) == cores


def test_usage_of_others_leaves_out_this_process(monkeypatch: pytest.MonkeyPatch) -> None:
    core = min(os.sched_getaffinity(0))
    clock = {"now": 10.0, "busy": 100.0, "own": 50.0}
    monkeypatch.setattr(core_limit, "read_busy_seconds", lambda: {core: clock["busy"], 10**6: clock["busy"]})
    monkeypatch.setattr(time, "monotonic", lambda: clock["now"])
    monkeypatch.setattr(time, "process_time", lambda: clock["own"])
    usage = CoreUsage()
    clock |= {"now": 12.0, "busy": 103.0, "own": 51.0}
    assert usage.measure_others() == 1.0
    clock |= {"now": 14.0, "busy": 104.0, "own": 53.0}  # clocks of different precision
    assert usage.measure_others() == 0.0
