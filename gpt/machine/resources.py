"""Cores and memory that this process may use; read without importing torch."""

import os
from collections.abc import Callable, Iterator
from pathlib import Path

CGROUP = Path("/sys/fs/cgroup")
"""Folder where control groups are mounted: of version 2 (Linux's cgroup-v2.rst), or a folder for each controller of
version 1 (cgroup-v1/)."""
OWN_CGROUPS = Path("/proc/self/cgroup")
"""This process's path in each hierarchy, as HIERARCHY:CONTROLLERS:PATH (cgroups(7))."""
MEMINFO = Path("/proc/meminfo")
MEMORY_SHARE = 0.5
"""Share of a machine's memory that a run plans with; the rest is for fragmentation in the allocator."""


def usable_cores() -> int:
    """Return the number of cores for this process, at least 1: the least of its affinity and its groups' limits."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, min(cores, round(cgroup_cores() or cores)))


def find_memory_budget() -> int:
    """Return the bytes that all ranks on this machine together may plan with.

    A share of the total, so that equal machines plan equally, and less only if other programs use the rest.
    """
    meminfo = _read_meminfo()
    total = min(meminfo.get("MemTotal", _find_installed_memory()), cgroup_memory() or float("inf"))
    return int(min(total * MEMORY_SHARE, meminfo.get("MemAvailable", total)))


def find_free_host_memory() -> int | None:
    """Return the bytes that are free now on this machine and in its control groups; None if unknown."""
    limits = [
        *_read_limits("memory", lambda group: _read_room(group, "memory.max", "memory.current")),
        *_read_limits("memory", lambda group: _read_room(group, "memory.limit_in_bytes", "memory.usage_in_bytes")),
    ]
    free = _read_meminfo().get("MemAvailable")
    return int(min([*limits, *([] if free is None else [free])], default=0)) or None


def cgroup_cores() -> float | None:
    """Return the cores that this process's control groups and all groups above them allow; None without a limit."""
    limits = [
        *_read_limits("cpu", _read_quota),
        *_read_limits("cpuset", lambda group: _count_cpus(group / "cpuset.cpus.effective")),
        *_read_limits("cpuset", lambda group: _count_cpus(group / "cpuset.effective_cpus")),
    ]
    return min(limits, default=None)


def cgroup_memory() -> float | None:
    """Return the bytes that this process's control groups and all groups above them allow; None without a limit."""
    limits = [
        *_read_limits("memory", lambda group: _read_number(group / "memory.max")),
        *_read_limits("memory", lambda group: _read_number(group / "memory.limit_in_bytes")),
    ]
    return min(limits, default=None)


def _read_limits(controller: str, read: Callable[[Path], float | None]) -> Iterator[float]:
    """Yield the limits that `read` finds in this process's groups and in all groups above them."""
    for group in _list_groups(controller):
        try:
            limit = read(group)
        except (OSError, ValueError, ZeroDivisionError):  # no such file, or no number in it: no limit
            continue
        if limit is not None and limit > 0:
            yield limit


def _list_groups(controller: str) -> Iterator[Path]:
    """Yield the folders of this process's groups up to their roots, in every hierarchy that has the controller.

    A container may see a path that only exists on its host; its own limits are then at the root.
    """
    try:
        lines = OWN_CGROUPS.read_text(encoding="utf-8", errors="surrogateescape").splitlines()
    except OSError:
        lines = []
    own = {fields[1]: fields[2] for line in lines if len(fields := line.split(":", 2)) == 3}
    mounted = {"": own.get("", "/"), "unified": own.get("", "/"), controller: "/"}
    mounted |= {names: path for names, path in own.items() if controller in names.split(",")}
    mounted[controller] = next((path for names, path in own.items() if controller in names.split(",")), "/")
    for mount, path in mounted.items():
        group = CGROUP / mount / path.lstrip("/")
        while True:
            yield group
            if group == CGROUP / mount:
                break
            group = group.parent


def _read_quota(group: Path) -> float | None:
    """Return the cores that a group's share of CPU time equals."""
    if (group / "cpu.max").exists():  # version 2
        quota, period = (group / "cpu.max").read_text(encoding="ascii").split()
        return None if quota == "max" else int(quota) / int(period)
    quota_us, period_us = (_read_number(group / f"cpu.cfs_{name}_us") for name in ("quota", "period"))
    return None if quota_us is None or period_us is None else quota_us / period_us


def _read_number(path: Path) -> float | None:
    text = path.read_text(encoding="ascii").strip()
    return None if text == "max" else int(text)


def _read_room(group: Path, limit_file: str, usage_file: str) -> float | None:
    """Return the bytes below a group's limit that are not in use."""
    limit, usage = _read_number(group / limit_file), _read_number(group / usage_file)
    return None if limit is None or usage is None else max(1, limit - usage)


def _count_cpus(path: Path) -> int:
    """Return the number of CPUs in a list such as 0-3,8."""
    spans = (span.partition("-") for span in path.read_text(encoding="ascii").strip().split(","))
    return sum(int(last or first) - int(first) + 1 for first, _, last in spans)


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
