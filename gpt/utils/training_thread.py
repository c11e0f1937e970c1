"""The thread that trains, seen from another thread: how far it has come, whether it waits, and where."""

import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from types import FrameType

import gpt
from gpt.utils.hang import NO_PROGRESS, Progress

MAX_IDLE_SHARE = 0.05
"""A thread that uses less of a core's time than this waits for something."""
PACKAGE = Path(gpt.__file__).parent
COMPILER_FILES = ("torch/_dynamo/convert_frame.py", "torch/_inductor/compile_fx.py")
"""Files whose functions are on the stack of a thread that compiles the model."""


class TrainingThread:
    """Watches the training thread; every method but `follow` is called by one other thread.

    Args:
        timeout: seconds without progress after which the thread may be blocked.
        waits_idle: whether a thread that waits for another rank uses no time. On a GPU it may spin.
        clock: monotonic, in seconds.
    """

    def __init__(self, timeout: float, *, waits_idle: bool, clock: Callable[[], float] = time.monotonic):
        self._timeout, self._waits_idle, self._now = timeout, waits_idle, clock
        self._read_progress: Callable[[], Progress] | None = None
        self._ident = 0
        self._cpu_clock: int | None = None
        self._progress = NO_PROGRESS
        self._cpu_seconds = self._examined_at = self._advanced_at = self._busy_at = 0.0

    def follow(self, read_progress: Callable[[], Progress] | None) -> None:
        """Watch the calling thread from now on; None: watch none.

        Args:
            read_progress: returns its progress, from any thread.
        """
        self._ident = threading.get_ident()
        has_clock = self._waits_idle and hasattr(time, "pthread_getcpuclockid")  # not on macOS
        self._cpu_clock = time.pthread_getcpuclockid(self._ident) if has_clock else None
        self._advanced_at = self._busy_at = self._examined_at = self._now()
        self._read_progress = read_progress

    def examine(self) -> tuple[Progress, bool]:
        """Return the thread's progress, and whether it has been blocked in a step for the timeout."""
        read_progress, now = self._read_progress, self._now()
        if read_progress is None:
            return NO_PROGRESS, False
        progress = read_progress()
        if progress != self._progress:
            self._progress, self._advanced_at = progress, now
        if self._waits_idle and not self._is_idle(now):
            self._busy_at = now
        self._examined_at = now
        waits = now - max(self._advanced_at, self._busy_at) >= self._timeout
        return progress, progress.in_step and waits and not is_compiling()

    def find_place(self) -> str:
        """Return file and line of the package where the thread is; empty if it has come further lately."""
        if self._read_progress is None or self._now() - self._advanced_at < self._timeout / 2:
            return ""
        frame = sys._current_frames().get(self._ident)
        while frame is not None and not Path(frame.f_code.co_filename).is_relative_to(PACKAGE):
            frame = frame.f_back
        return "" if frame is None else f"{Path(frame.f_code.co_filename).relative_to(PACKAGE.parent)}:{frame.f_lineno}"

    def _is_idle(self, now: float) -> bool:
        """Return whether the thread has hardly computed since the last look; False if that is not known."""
        if self._cpu_clock is None:
            return False
        try:
            used = time.clock_gettime(self._cpu_clock)
        except OSError:  # the thread has ended
            return False
        computed, self._cpu_seconds = used - self._cpu_seconds, used
        return computed < MAX_IDLE_SHARE * (now - self._examined_at)


def is_compiling() -> bool:
    """Return whether any thread compiles; the backward pass on a GPU compiles in a thread of its own."""

    def compiles(frame: FrameType | None) -> bool:
        while frame is not None and not frame.f_code.co_filename.endswith(COMPILER_FILES):
            frame = frame.f_back
        return frame is not None

    return any(compiles(frame) for frame in sys._current_frames().values())
