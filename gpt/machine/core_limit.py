"""Limit of the cores that compute threads run on, while other programs use the rest (Linux).

Threads of a team meet after every operation. If one of them shares its core with another program, the others wait for
it: two threads beside one program took 2.1 times as long as alone, although 1.5 cores were left to them, and 1.7 times
on one core that they had for themselves. Where a thread runs changes no result.
"""

import contextlib
import os
import random
import time
from collections.abc import Iterable
from pathlib import Path

CORE_TIMES = Path("/proc/stat")
"""File with the times of each core (proc_stat(5))."""
TICKS_PER_SECOND = os.sysconf("SC_CLK_TCK") if hasattr(os, "sysconf") else 100
N_FIELDS, NICE_FIELD, IDLE_FIELDS = 8, 1, (3, 4)
"""Fields of a core's line that add up to its time (user to steal): time of programs of low priority, and idle time."""


def read_busy_seconds() -> dict[int, float]:
    """Return the seconds for which each core has been busy; empty where the system does not report them.

    Programs of low priority (nice) do not count, because they give way to this process, unless its priority is low too.
    """
    try:
        lines = CORE_TIMES.read_text(encoding="ascii").splitlines()
    except OSError:
        return {}
    left_out = IDLE_FIELDS if os.getpriority(os.PRIO_PROCESS, 0) > 0 else (*IDLE_FIELDS, NICE_FIELD)
    busy = {}
    for name, *times in (line.split() for line in lines if line.startswith("cpu") and not line.startswith("cpu ")):
        ticks = sum(int(ticks) for index, ticks in enumerate(times[:N_FIELDS]) if index not in left_out)
        busy[int(name.removeprefix("cpu"))] = ticks / TICKS_PER_SECOND
    return busy


def choose_core_count(cores: int, others: float, threads: int) -> int:
    """Return the number of cores to run on: as many as others leave free, at least 1, if it divides the threads evenly.

    Args:
        cores: number of cores that the process may use.
        others: cores that other programs use of them, not rounded.
        threads: size of the team that computes.
    """
    free = max(1, round(cores - others))
    return free if free < threads and threads % free == 0 else cores


class CoreUsage:
    """Meter of the cores that other programs use of those that this process may use."""

    def __init__(self) -> None:
        self._cores = os.sched_getaffinity(0)
        self._last = self._read()

    def measure_others(self) -> float:
        """Return the cores that other programs have used since the last call, not rounded; 0 if unknown."""
        last, self._last = self._last, self._read()
        seconds, busy, own = (now - before for now, before in zip(self._last, last, strict=True))
        return max(0.0, busy - own) / max(seconds, 1e-9)

    def _read(self) -> tuple[float, float, float]:
        """Return seconds on a clock, busy seconds of the cores, and CPU seconds of this process."""
        busy = read_busy_seconds()
        return time.monotonic(), sum(busy.get(core, 0.0) for core in self._cores), time.process_time()


class CoreLimit:
    """Cores that the threads of this process run on.

    Args:
        threads: size of the team that computes.
    """

    def __init__(self, threads: int):
        self._threads = threads
        self._allowed = self._current = frozenset(os.sched_getaffinity(0))

    def update(self, thread_ids: Iterable[int], others: float) -> None:
        """Limit threads to as many cores as others leave free, or lift the limit.

        Args:
            thread_ids: all threads of this process; one that a limited thread has started is limited, too.
            others: cores that other programs use; 0 lifts the limit.
        """
        count = choose_core_count(len(self._allowed), others, self._threads)
        if count == len(self._current):
            return
        # Other runs choose as well; at random they soon have separate cores. The run's own generators stay as they are.
        self._current = frozenset(random.SystemRandom().sample(sorted(self._allowed), count))
        for thread in thread_ids:
            with contextlib.suppress(OSError):  # it has ended, or this process may not use the cores any more
                os.sched_setaffinity(thread, self._current)
