from pathlib import Path

import pytest

from gpt.machine import resources
from gpt.machine.resources import cgroup_limit, find_memory_budget, usable_cores

GIB = 2**30


@pytest.fixture
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Set up a machine with 16 GiB, all of it free, and 8 cores; return its folder of limits."""
    monkeypatch.setattr(resources, "CGROUP", tmp_path)
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
    assert cgroup_limit("cpu.max") is None
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
