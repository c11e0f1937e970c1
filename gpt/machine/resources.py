"""Cores and memory that this process may use; read without importing torch."""

import os
from pathlib import Path

CGROUP = Path("/sys/fs/cgroup")
"""Folder in which a container sees its own limits (Linux's cgroup-v2.rst)."""
MEMINFO = Path("/proc/meminfo")
MEMORY_SHARE = 0.5
"""Share of a machine's memory that a run plans with; the rest is for fragmentation in the allocator."""


def usable_cores() -> int:
    """Return the number of cores for this process: the least of its affinity and its container's share of CPU time."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    quota = cgroup_limit("cpu.max")
    return max(1, min(cores, round(quota))) if quota else cores


def find_memory_budget() -> int:
    """Return the bytes that all ranks on this machine together may plan with.

    A share of the total, so that equal machines plan equally, and less only if other programs use the rest.
    """
    meminfo = _read_meminfo()
    total = min(meminfo.get("MemTotal", _find_installed_memory()), cgroup_limit("memory.max") or float("inf"))
    return int(min(total * MEMORY_SHARE, meminfo.get("MemAvailable", total)))


def find_free_host_memory() -> int | None:
    """Return the bytes that are free on this machine and in its container now; None if unknown."""
    free = _read_meminfo().get("MemAvailable")
    limit, used = cgroup_limit("memory.max"), cgroup_limit("memory.current")
    if limit is None or used is None:
        return free
    return max(0, min(int(limit - used), free if free is not None else int(limit)))


def cgroup_limit(name: str) -> float | None:
    """Return a limit of the container that this process runs in; None if there is none.

    Args:
        name: the limit's file: memory.max or memory.current (bytes), or cpu.max (two numbers, returned as their
            quotient: cores).
    """
    try:
        limit, *period = (CGROUP / name).read_text(encoding="ascii").split()
    except (OSError, ValueError):
        return None
    return None if limit == "max" else int(limit) / int(period[0] if period else 1)


def _find_installed_memory() -> int:
    if hasattr(os, "sysconf"):
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return 2**33  # Windows needs an API of its own; few machines have less than 8 GiB


def _read_meminfo() -> dict[str, int]:
    """Return /proc/meminfo in bytes; empty on other systems than Linux."""
    if not MEMINFO.exists():
        return {}
    lines = (line.partition(":") for line in MEMINFO.read_text(encoding="ascii").splitlines())
    return {name: int(value.split()[0]) * 1024 for name, _, value in lines}
