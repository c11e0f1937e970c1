"""What is set in the process so that a CPU trains fast."""

import ctypes
import os
import sys

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # glibc, malloc.h
KEPT_BYTES = 2**30


def keep_freed_memory() -> bool:
    """Let glibc keep large blocks that were freed, for the next step to use; whether it could be told.

    By default it gives every block of 32 MiB or more back to the kernel, which maps it again, zeroed page by page, at
    each step (mallopt(3), M_MMAP_THRESHOLD). Takes effect for blocks that are allocated from now on.
    """
    if not sys.platform.startswith("linux"):
        return False
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError):  # another libc, such as musl
        return False
    return bool(mallopt(M_MMAP_THRESHOLD, KEPT_BYTES) and mallopt(M_TRIM_THRESHOLD, KEPT_BYTES))


def usable_cores() -> int:
    """Cores that this process may run on."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1
