"""What of the machine this process may use; read without importing torch."""

import os
from pathlib import Path

CGROUP = Path("/sys/fs/cgroup")
"""Where a container sees its own limits (Linux's cgroup-v2.rst)."""
MEMINFO = Path("/proc/meminfo")
MEMORY_SHARE = 0.5
"""Of a machine's memory, what a run plans with: an allocator keeps what was freed, in pieces that do not always fit."""


def usable_cores() -> int:
    """Cores that this process may run on: of the machine, of its affinity, of its container's share of time."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    quota = cgroup_limit("cpu.max")
    return max(1, min(cores, round(quota))) if quota else cores


def memory_to_plan_with() -> int:
    """Bytes of this machine's memory that its training processes may plan with, all together.

    A share of all there is, so that equal machines plan equally, and less only where others already use the rest.
    """
    known = _meminfo()
    total = min(known.get("MemTotal", _installed_memory()), cgroup_limit("memory.max") or float("inf"))
    return int(min(total * MEMORY_SHARE, known.get("MemAvailable", total)))


def cgroup_limit(name: str) -> float | None:
    """A limit of the container that this process runs in; None where there is none.

    Args:
        name: of the limit's file: memory.max, in bytes, or cpu.max, whose two numbers are read as their quotient.
    """
    try:
        limit, *period = (CGROUP / name).read_text(encoding="ascii").split()
    except (OSError, ValueError):
        return None
    return None if limit == "max" else int(limit) / int(period[0] if period else 1)


def _installed_memory() -> int:
    if hasattr(os, "sysconf"):
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return 2**33  # Windows says it through an interface of its own; 8 GiB is what few machines lack


def _meminfo() -> dict[str, int]:
    """Linux's memory in bytes; empty elsewhere."""
    if not MEMINFO.exists():
        return {}
    lines = (line.partition(":") for line in MEMINFO.read_text(encoding="ascii").splitlines())
    return {name: int(value.split()[0]) * 1024 for name, _, value in lines}
