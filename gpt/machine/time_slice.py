"""Time slices of threads: how long one computes before another program of equal priority has its turn (Linux)."""

import contextlib
import ctypes
import errno
import os
import platform
import sys
from collections.abc import Iterable

SYSTEM_CALLS = {"x86_64": 314, "aarch64": 274}
"""Number of sched_setattr(2), for which glibc has no function before 2.41."""
SHORT_SLICE_NANOSECONDS = 100_000
"""Shortest slice that Linux accepts."""


class SchedAttr(ctypes.Structure):
    """Structure sched_attr of sched_setattr(2), in its first version."""

    _fields_ = (
        ("size", ctypes.c_uint32),
        ("policy", ctypes.c_uint32),
        ("flags", ctypes.c_uint64),
        ("nice", ctypes.c_int32),
        ("priority", ctypes.c_uint32),
        ("runtime", ctypes.c_uint64),
        ("deadline", ctypes.c_uint64),
        ("period", ctypes.c_uint64),
    )


def shorten_time_slices(thread_ids: Iterable[int]) -> None:
    """Give threads the shortest time slices, so that one that wakes up runs at once; its share of a core stays.

    Linux runs the thread whose slice would end first (from 6.12 on; "EEVDF"). With slices of the usual length, a thread
    that has waited for another of its team also waits until a program beside it has used up its own. Nothing happens
    on other systems, and for threads whose scheduling the user has set (chrt).

    Args:
        thread_ids: threads of this process; those that have ended are left out.
    """
    number = SYSTEM_CALLS.get(platform.machine()) if sys.platform == "linux" else None
    if number is None:
        return
    library = ctypes.CDLL(None, use_errno=True)
    for thread in thread_ids:
        with contextlib.suppress(OSError):
            if os.sched_getscheduler(thread) != os.SCHED_OTHER:
                continue
            nice = os.getpriority(os.PRIO_PROCESS, thread)
            attributes = SchedAttr(
                size=ctypes.sizeof(SchedAttr), policy=os.SCHED_OTHER, nice=nice, runtime=SHORT_SLICE_NANOSECONDS
            )
            if library.syscall(number, thread, ctypes.byref(attributes), 0) and ctypes.get_errno() == errno.ENOSYS:
                return
