"""Settings of the process for CUDA, with torch.cuda replaced."""

import os
from collections.abc import Iterator

import pytest
import torch

from gpt.errors import UserError
from gpt.machine.cuda_runtime import name_nondeterministic_operator, set_up_cuda, uses_tf32


@pytest.fixture(autouse=True)
def restored_torch(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Give torch an Ampere GPU, and restore its global settings afterwards."""
    import torch._inductor.config

    for name in ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF", "CUBLAS_WORKSPACE_CONFIG"):
        monkeypatch.setenv(name, "")  # so that the value is restored
        monkeypatch.delenv(name)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (8, 0))
    precision, cudnn = torch.get_float32_matmul_precision(), torch.backends.cuda.cudnn_sdp_enabled()
    yield
    torch.set_float32_matmul_precision(precision)
    torch.use_deterministic_algorithms(False)
    torch.backends.cuda.enable_cudnn_sdp(cudnn)
    torch._inductor.config.deterministic = False


def test_allocator_uses_expandable_segments_unless_the_user_set_it(monkeypatch: pytest.MonkeyPatch) -> None:
    assert set_up_cuda(reproducible=False)["expandable_segments"] is True
    assert os.environ["PYTORCH_ALLOC_CONF"] == "expandable_segments:True"
    monkeypatch.delenv("PYTORCH_ALLOC_CONF")
    monkeypatch.setenv("PYTORCH_CUDA_ALLOC_CONF", "max_split_size_mb:512")
    assert set_up_cuda(reproducible=False)["expandable_segments"] is False
    assert "PYTORCH_ALLOC_CONF" not in os.environ
    monkeypatch.setenv("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True,max_split_size_mb:512")
    assert set_up_cuda(reproducible=False)["expandable_segments"] is True


def test_allocator_that_is_in_use_keeps_its_segments(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    assert set_up_cuda(reproducible=False)["expandable_segments"] is False
    assert "PYTORCH_ALLOC_CONF" not in os.environ


def test_tf32_is_used_where_the_card_has_it(monkeypatch: pytest.MonkeyPatch) -> None:
    set_up_cuda(reproducible=False)
    assert torch.get_float32_matmul_precision() == "high"
    assert uses_tf32()
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (7, 5))
    assert not uses_tf32()
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    torch.set_float32_matmul_precision("highest")
    assert not uses_tf32()


def test_set_up_does_not_initialize_cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    initializations: list[None] = []
    monkeypatch.setattr(torch.cuda, "_lazy_init", lambda: initializations.append(None))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: torch.cuda._lazy_init())
    set_up_cuda(reproducible=True)
    assert not initializations  # the allocator's settings are read then


def test_reproducible_mode_restricts_torch_to_deterministic_kernels() -> None:
    assert set_up_cuda(reproducible=False)["deterministic"] is False
    assert set_up_cuda(reproducible=True)["deterministic"] is True
    assert torch.are_deterministic_algorithms_enabled()
    assert not torch.is_deterministic_algorithms_warn_only_enabled()
    assert not torch.backends.cuda.cudnn_sdp_enabled()
    assert torch.backends.cuda.flash_sdp_enabled()
    assert torch._inductor.config.deterministic
    assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":4096:8"


def test_reproducible_mode_refuses_a_workspace_that_is_not_deterministic(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":16:8")
    set_up_cuda(reproducible=True)
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":0:0")
    with pytest.raises(UserError, match=r"^--parallel.reproducible: CUBLAS_WORKSPACE_CONFIG is ':0:0', .*; unset it"):
        set_up_cuda(reproducible=True)


def test_operator_without_a_deterministic_form_is_named_in_one_line() -> None:
    torch.use_deterministic_algorithms(True)
    with (
        pytest.raises(UserError, match=r"^--parallel.reproducible: put_ has no deterministic form .*no-reproducible$"),
        name_nondeterministic_operator(),
    ):
        torch.zeros(4).put_(torch.tensor([0, 0]), torch.ones(2))
    with pytest.raises(RuntimeError, match="another error"), name_nondeterministic_operator():
        raise RuntimeError("another error")
