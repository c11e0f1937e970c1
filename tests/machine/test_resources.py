from pathlib import Path

import pytest

from gpt.machine import resources
from gpt.machine.resources import (
    cgroup_cores,
    cgroup_memory,
    find_free_host_memory,
    find_memory_budget,
    usable_cores,
)

GIB = 2**30


@pytest.fixture
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Set up a machine with 16 GiB, all of it free, and 8 cores; return its folder of limits."""
    monkeypatch.setattr(resources, "CGROUP", tmp_path)
    monkeypatch.setattr(resources, "OWN_CGROUPS", tmp_path / "own")
    monkeypatch.setattr(resources, "MEMINFO", tmp_path / "meminfo")
    monkeypatch.setattr(resources.os, "sched_getaffinity", lambda _: set(range(8)), raising=False)
    (tmp_path / "meminfo").write_text(f"MemTotal: {16 * 2**20} kB\nMemAvailable: {16 * 2**20} kB\nHugePages_Total: 0\n")
    return tmp_path


@pytest.mark.parametrize(
    ("content", "cores"), [("max 100000", 8), ("200000 100000", 2), ("150000 100000", 2), ("10000 100000", 1), ("", 8)]
)
def test_a_containers_cpu_quota_limits_the_cores(machine: Path, content: str, cores: int) -> None:
    (machine / "cpu.max").write_text(content)
    assert usable_cores() == cores


def test_without_a_quota_cores_are_those_of_the_affinity(machine: Path) -> None:
    assert cgroup_cores() is None
    assert cgroup_memory() is None
    assert usable_cores() == 8


def test_memory_budget_is_a_share_of_the_machine_or_its_container(machine: Path) -> None:
    assert find_memory_budget() == 8 * GIB
    (machine / "memory.max").write_text("max\n")
    assert find_memory_budget() == 8 * GIB
    (machine / "memory.max").write_text(f"{4 * GIB}\n")
    assert find_memory_budget() == 2 * GIB


def test_memory_budget_shrinks_only_if_others_use_the_rest(machine: Path) -> None:
    for free, planned in ((9, 8), (3, 3)):
        (machine / "meminfo").write_text(f"MemTotal: {16 * 2**20} kB\nMemAvailable: {free * 2**20} kB\n")
        assert find_memory_budget() == planned * GIB


def test_memory_budget_is_known_without_meminfo(machine: Path) -> None:
    (machine / "meminfo").unlink()
    assert find_memory_budget() > 0


def write_files(root: Path, files: dict[str, str]) -> None:
    for path, text in files.items():
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        (root / path).write_text(text)


V1_UNLIMITED = "9223372036854771712\n"
TREES = {
    "version 1": (
        "5:memory:/\n4:cpu:/\n",
        {
            "memory/memory.limit_in_bytes": f"{2 * GIB}\n",
            "cpu/cpu.cfs_quota_us": "100000\n",
            "cpu/cpu.cfs_period_us": "100000\n",
        },
        (2, 1),
    ),
    "version 1, nested, the parents limit": (
        "5:memory:/job/step\n4:cpu,cpuacct:/job/step\n",
        {
            "memory/job/step/memory.limit_in_bytes": V1_UNLIMITED,
            "memory/job/memory.limit_in_bytes": f"{3 * GIB}",
            "memory/memory.limit_in_bytes": V1_UNLIMITED,
            "cpu,cpuacct/job/step/cpu.cfs_quota_us": "-1",
            "cpu,cpuacct/job/step/cpu.cfs_period_us": "100000",
            "cpu,cpuacct/job/cpu.cfs_quota_us": "150000",
            "cpu,cpuacct/job/cpu.cfs_period_us": "50000",
            "cpu,cpuacct/cpu.cfs_quota_us": "-1",
            "cpu,cpuacct/cpu.cfs_period_us": "100000",
        },
        (3, 3),
    ),
    "version 1, a container that sees its host's path": (
        "5:memory:/docker/0123\n4:cpu:/docker/0123\n",
        {
            "memory/memory.limit_in_bytes": f"{GIB}",
            "cpu/cpu.cfs_quota_us": "400000",
            "cpu/cpu.cfs_period_us": "100000",
        },
        (1, 4),
    ),
    "version 2, nested, the smallest wins": (
        "0::/user.slice/job\n",
        {
            "user.slice/job/memory.max": "max\n",
            "user.slice/memory.max": f"{5 * GIB}\n",
            "memory.max": f"{6 * GIB}\n",
            "user.slice/job/cpu.max": "600000 100000\n",
            "user.slice/cpu.max": "max 100000\n",
            "cpu.max": "200000 100000\n",
        },
        (5, 2),
    ),
    "hybrid": (
        "5:memory:/a\n0::/b\n",
        {"memory/a/memory.limit_in_bytes": f"{4 * GIB}", "unified/b/cpu.max": "100000 50000"},
        (4, 2),
    ),
    "half a core": (
        "0::/\n",
        {"cpu.max": "50000 100000", "memory.max": f"{GIB // 2}"},
        (0.5, 1),
    ),
    "cpuset": ("0::/a\n", {"a/cpuset.cpus.effective": "0-1,5\n", "cpuset.cpus.effective": "0-7\n"}, (16, 3)),
    "cpuset of version 1": ("3:cpuset:/a\n", {"cpuset/a/cpuset.effective_cpus": "2\n"}, (16, 1)),
    "files without numbers": (
        "no line\n0::/a\n",
        {"a/memory.max": "", "memory.max": "abc", "cpu.max": "1 0", "a/cpu.max": "5", "cpuset.cpus.effective": "\n"},
        (16, 8),
    ),
}


@pytest.mark.parametrize("tree", TREES)
def test_limits_of_control_groups_and_of_all_above_them_hold(machine: Path, tree: str) -> None:
    own, files, (gibibytes, cores) = TREES[tree]
    (machine / "own").write_text(own)
    write_files(machine, files)
    assert usable_cores() == cores
    assert find_memory_budget() == gibibytes * GIB // 2


def test_free_memory_is_what_the_machine_and_its_container_have_left(machine: Path) -> None:
    assert find_free_host_memory() == 16 * GIB
    (machine / "memory.max").write_text(f"{4 * GIB}\n")
    (machine / "memory.current").write_text(f"{3 * GIB}\n")
    assert find_free_host_memory() == GIB
    (machine / "memory.current").write_text(f"{5 * GIB}\n")
    assert find_free_host_memory() == 1
    (machine / "memory.max").write_text("max\n")
    (machine / "meminfo").unlink()
    assert find_free_host_memory() is None
