from pathlib import Path

import pytest
import torch

from gpt.errors import UserError
from gpt.machine.hardware import (
    cpu_has_bfloat16,
    detect_machine,
    find_device,
    find_free_memory,
    peak_memory,
    reset_peak_memory,
)
from gpt.utils.helper import plural


def test_auto_is_the_best_device_of_the_machine() -> None:
    expected = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    assert find_device("auto") == expected
    assert find_device("cpu") == "cpu"


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
def test_a_missing_device_is_reported_with_the_nearest() -> None:
    with pytest.raises(UserError, match=r"--device cuda is not available on this machine; nearest: (cpu|mps)"):
        find_device("cuda")


def test_detect_machine_finds_device_and_threads() -> None:
    facts = detect_machine("cpu", world_size=2)
    assert (facts.device, facts.world_size, facts.has_bfloat16) == ("cpu", 2, cpu_has_bfloat16())
    assert facts.device_name.endswith(f", {plural(torch.get_num_threads(), 'thread')}")


@pytest.mark.skipif(not Path("/proc/cpuinfo").exists(), reason="reads Linux's /proc/cpuinfo")
def test_bfloat16_support_is_what_torch_finds() -> None:
    capabilities = torch.cpu.get_capabilities() if hasattr(torch.cpu, "get_capabilities") else {}
    if not capabilities:
        pytest.skip("this torch does not report capabilities")
    assert cpu_has_bfloat16() == (capabilities.get("avx512_bf16", False) or capabilities.get("amx_bf16", False))


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads Linux's /proc")
def test_peak_memory_counts_a_tensor_that_was_held() -> None:
    before = peak_memory("cpu")
    assert before is not None
    held = torch.ones(2**28 // 4)
    after = peak_memory("cpu")
    assert after is not None
    assert before <= after
    assert after >= held.nbytes
    assert peak_memory("mps") is None


@pytest.mark.skipif(not Path("/proc/meminfo").exists(), reason="reads Linux's /proc/meminfo")
def test_free_memory_of_the_host_is_less_than_its_total() -> None:
    total = int(Path("/proc/meminfo").read_text().split()[1]) * 1024
    free = find_free_memory("cpu")
    assert free is not None
    assert 0 < free < total


def test_peak_of_a_gpu_is_measured_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[str] = []
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda: calls.append("reset"))
    reset_peak_memory("cpu")
    assert calls == []
    reset_peak_memory("cuda")
    assert calls == ["reset"]
