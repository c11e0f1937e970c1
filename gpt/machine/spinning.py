"""Waiting of OpenMP threads: they spin while their cores are free, and sleep while other programs use them.

A thread that waits for the others of its team spins for some milliseconds, because waking it up takes longer than most
operations. Beside other programs that is a loss: a spinning thread holds the core that the missing thread needs, and a
step can take 20 times as long. A thread of its own therefore watches how long the compute threads wait for a core:

    threads spin    --- one of them waits for more than MAX_WAITING_SHARE --->    threads sleep
    threads sleep   --- others use few cores, and MIN_SLEEP_SECONDS or more have passed --->    threads spin

While they sleep they may also be limited to some of the cores (`gpt.machine.core_limit`). How and where a thread waits
changes no result: the number of threads, and what each of them computes, stay the same.
"""

import ctypes
import os
import threading
import time
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple, Protocol

from gpt.machine.core_limit import CoreLimit, CoreUsage
from gpt.machine.time_slice import shorten_time_slices

USER_VARIABLES = ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY", "KMP_BLOCKTIME", "KMP_LIBRARY")
"""Environment variables by which users decide how threads wait; nothing is changed if one is set."""
THREADS = Path("/proc/self/task")
"""Folder with a folder for each thread of this process; `schedstat` in it holds its times (Linux, sched-stats.rst)."""
POLL_SECONDS = 0.5
MAX_WAITING_SHARE = 0.35
"""Share of its time that a spinning thread may wait for a core; docs/EXPERIMENTS.md has the measurements."""
MIN_ACTIVE_SHARE = 0.2
"""Share of an interval for which a thread must want a core; idle threads want less."""
MIN_RUN_SHARE = 0.1
"""Share of the busiest thread's time that a thread must have run; threads that run less, such as the one that watches
the others, compute nothing."""
MAX_CORES_OF_OTHERS = 0.5
"""Cores that other programs may use when sleeping threads try spinning again."""
MIN_SLEEP_SECONDS, MAX_SLEEP_SECONDS = 1.0, 16.0
"""Bounds of the time after which sleeping threads try spinning again."""


class SpinControl(Protocol):
    """Control of how the threads of an OpenMP library wait; every thread may call it."""

    def sleep(self) -> None:
        """Let waiting threads sleep at once."""
        ...

    def spin(self) -> None:
        """Let them spin for as long as the library does by default."""
        ...


class GnuSpinControl:
    """GNU's library stops spinning while it manages more threads than this process has cores (libgomp, wait.h).

    A second team that does nothing makes it manage more. It is gone when the thread that started it ends.

    Args:
        library: the process's symbols.
        threads: size of the team that computes.
    """

    def __init__(self, library: ctypes.CDLL, threads: int):
        self._start_team = library.GOMP_parallel
        self._start_team.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_uint, ctypes.c_uint]
        self._team_body = ctypes.cast(library.omp_get_thread_num, ctypes.c_void_p)  # any function that does nothing
        self._allow_any_size = library.omp_set_dynamic
        self._team_size = max(2, len(os.sched_getaffinity(0)) - threads + 2)
        self._end: threading.Event | None = None
        self._thread: threading.Thread | None = None

    def sleep(self) -> None:
        """Start the second team and keep it."""
        started, self._end = threading.Event(), threading.Event()

        def keep_team(end: threading.Event) -> None:
            self._allow_any_size(0)  # OMP_DYNAMIC would start fewer threads
            self._start_team(self._team_body, None, self._team_size, 0)
            started.set()
            end.wait()

        self._thread = threading.Thread(target=keep_team, args=(self._end,), name="second-team", daemon=True)
        self._thread.start()
        started.wait()

    def spin(self) -> None:
        """End the second team."""
        if self._end is not None and self._thread is not None:
            self._end.set()
            self._thread.join()


class LLVMSpinControl:
    """LLVM's and Intel's library spin for the block time, which can be set at any time.

    Args:
        library: the process's symbols.
    """

    def __init__(self, library: ctypes.CDLL):
        self._set_defaults = library.kmp_set_defaults
        self._set_defaults.argtypes = [ctypes.c_char_p]
        self._default_milliseconds = library.kmp_get_blocktime()

    def sleep(self) -> None:
        """Set the block time to 0."""
        self._set_defaults(b"KMP_BLOCKTIME=0")

    def spin(self) -> None:
        """Set the block time that the library began with."""
        self._set_defaults(b"KMP_BLOCKTIME=%d" % self._default_milliseconds)


class SpinPolicy:
    """Decision whether waiting threads spin; they do at first."""

    def __init__(self) -> None:
        self.spins = True
        self._sleep_seconds = MIN_SLEEP_SECONDS
        self._wakes_at = 0.0

    def update(self, waiting_share: float | None, others: float, now: float) -> bool:
        """Return whether threads spin from now on.

        Whether spinning pays off is judged only while threads spin: sleeping threads leave their cores to others, and
        wait for them longer.

        Args:
            waiting_share: share of the last interval that a compute thread waited for a core; None if nothing computed,
                which shows neither free nor busy cores.
            others: cores that other programs used in it; 0 if unknown.
            now: seconds on a monotonic clock.
        """
        if waiting_share is None:
            return self.spins
        if not self.spins:
            self.spins = now >= self._wakes_at and others <= MAX_CORES_OF_OTHERS
        elif waiting_share > MAX_WAITING_SHARE:
            self.spins = False
            self._wakes_at = now + self._sleep_seconds
            self._sleep_seconds = min(2 * self._sleep_seconds, MAX_SLEEP_SECONDS)
        else:
            self._sleep_seconds = MIN_SLEEP_SECONDS
        return self.spins


class ThreadTimes(NamedTuple):
    """Nanoseconds that a thread has run, and that it has waited for a core."""

    run: int
    waited: int


class _Watcher(threading.Thread):
    """Thread that applies a SpinPolicy and a CoreLimit to this process until `end`."""

    def __init__(self, control: SpinControl, limit: CoreLimit):
        super().__init__(name="spinning", daemon=True)
        self._control = control
        self._limit = limit
        self._ended = threading.Event()

    def run(self) -> None:
        policy, usage = SpinPolicy(), CoreUsage()
        times, then = read_thread_times(), time.monotonic()
        while not self._ended.wait(POLL_SECONDS):
            before, times, now = times, read_thread_times(), time.monotonic()
            waiting_share, others = find_waiting_share(before, times, now - then), usage.measure_others()
            spun, spins, then = policy.spins, policy.update(waiting_share, others, now), now
            if spins != spun:
                (self._control.spin if spins else self._control.sleep)()
            if spun and not spins:
                shorten_time_slices(times)
            self._limit.update(times, 0.0 if spins else others)
        if not policy.spins:
            self._control.spin()
            self._limit.update(read_thread_times(), 0.0)

    def end(self) -> None:
        """Let threads spin again and wait until this thread has ended."""
        self._ended.set()
        self.join()


_watchers: list[_Watcher] = []
"""The watcher of this process, if there is one."""


def sleep_when_busy(threads: int, *, enabled: bool = True) -> bool:
    """Let compute threads sleep instead of spin while other programs use their cores; return whether that is in effect.

    It is not where one thread computes, where the user has set one of USER_VARIABLES, and where the system does not
    report how long threads wait. A second call replaces the first.

    Args:
        threads: size of the team that computes.
        enabled: False ends it.
    """
    while _watchers:
        watcher = _watchers.pop()
        if watcher.is_alive():  # not in a fork
            watcher.end()
    control = find_spin_control(threads) if enabled else None
    if control is None:
        return False
    _watchers.append(_Watcher(control, CoreLimit(threads)))
    _watchers[0].start()
    return True


def find_spin_control(threads: int) -> SpinControl | None:
    """Return the control of this process's OpenMP library; None where nothing is to be controlled, or cannot be.

    Args:
        threads: size of the team that computes.
    """
    if threads == 1 or any(name in os.environ for name in USER_VARIABLES) or not read_thread_times():
        return None
    library = ctypes.CDLL(None)
    if hasattr(library, "kmp_set_defaults"):
        return LLVMSpinControl(library)
    return GnuSpinControl(library, threads) if hasattr(library, "GOMP_parallel") else None


def read_thread_times() -> dict[int, ThreadTimes]:
    """Return the times of every thread of this process by its id; empty where the system does not report them."""
    times = {}
    for folder in THREADS.iterdir() if THREADS.is_dir() else []:
        try:
            run, waited, _ = (folder / "schedstat").read_text(encoding="ascii").split()
        except (OSError, ValueError):  # it has just ended, or the kernel keeps no such statistics
            continue
        times[int(folder.name)] = ThreadTimes(int(run), int(waited))
    return times


def find_waiting_share(
    before: Mapping[int, ThreadTimes], after: Mapping[int, ThreadTimes], seconds: float
) -> float | None:
    """Return the largest share of its time that a compute thread waited for a core; None if no thread computed.

        share = waited / (run + waited)

    Args:
        before: times at the beginning of an interval.
        after: times at its end.
        seconds: length of the interval.
    """
    spent = [
        ThreadTimes(after[thread].run - before[thread].run, after[thread].waited - before[thread].waited)
        for thread in before.keys() & after.keys()
    ]
    longest_run = max((times.run for times in spent), default=0)
    shares = [
        times.waited / (times.run + times.waited)
        for times in spent
        if times.run >= MIN_RUN_SHARE * longest_run and times.run + times.waited > MIN_ACTIVE_SHARE * seconds * 1e9
    ]
    return max(shares, default=None)
