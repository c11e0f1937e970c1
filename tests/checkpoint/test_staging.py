"""Staging: one buffer for a state; for a GPU ordinary memory that is registered with CUDA, by a mock here."""

import logging
from types import SimpleNamespace
from unittest import mock

import pytest
import torch

from gpt.checkpoint.app_state import AppState
from gpt.checkpoint.staging import Staging, can_pin_memory, lay_out_tensors
from gpt.checkpoint.store import Snapshot
from gpt.configs.presets import PRESETS
from gpt.models.gpt import GPT
from tests.checkpoint.test_store import trained_state


class Cudart:
    """CUDA's functions for pinned memory, which record what is registered."""

    def __init__(self, status: int = 0):
        self.status = status
        self.registered: dict[int, int] = {}

    def cudaHostRegister(self, address: int, size: int, flags: int) -> int:  # noqa: N802
        if not self.status:
            self.registered[address] = size
        return self.status

    def cudaHostUnregister(self, address: int) -> int:  # noqa: N802
        del self.registered[address]
        return 0


def stage_from_gpu(cudart: Cudart, staging: Staging, state: AppState) -> Snapshot:
    """Copy a state whose tensors claim to be on a GPU."""
    event = SimpleNamespace(record=lambda: None, synchronize=lambda: None)
    with (
        mock.patch.object(torch.Tensor, "is_cuda", True),
        mock.patch.object(torch.cuda, "cudart", lambda: cudart),
        mock.patch.object(torch.cuda, "Event", lambda: event),
    ):
        return staging.copy(state, {}, 1)


def test_snapshot_equals_the_state_and_reuses_its_memory() -> None:
    state, staging = trained_state(), Staging()
    first = staging.copy(state, {"val/loss": 1.0}, 2)
    assert (first.metrics, first.world_size, first.progress) == ({"val/loss": 1.0}, 2, state.progress_json())
    for copies, tensors in ((first.model, state.model_tensors()), (first.optimizer, state.optimizer_tensors())):
        assert copies.keys() == tensors.keys()
        assert all(torch.equal(copies[name], tensor) for name, tensor in tensors.items())
        assert all(copies[name].dtype == tensor.dtype for name, tensor in tensors.items())
    second = staging.copy(state, {}, 2)
    assert {t.data_ptr() for t in first.model.values()} == {t.data_ptr() for t in second.model.values()}


def test_pinned_memory_is_at_most_a_tenth_more_than_the_state() -> None:
    config = PRESETS["gpt2-124m"]().model
    with torch.device("meta"), mock.patch("gpt.models.gpt.init_weights"):
        weights = list(GPT(config, seed=0).parameters())
    state = [*weights, *weights, *weights, *(torch.empty(()) for _ in weights)]  # AdamW: two moments and a step
    size = lay_out_tensors(state)[1]
    assert size <= 1.1 * sum(tensor.nbytes for tensor in state)
    assert size < 2**31 <= sum(2 ** (tensor.nbytes - 1).bit_length() for tensor in state)  # torch's pinned memory


def test_gpu_state_is_copied_to_registered_memory_of_its_own_size() -> None:
    cudart, staging, state = Cudart(), Staging(), trained_state()
    snapshot = stage_from_gpu(cudart, staging, state)
    tensors = [*snapshot.model.values(), *snapshot.optimizer.values()]
    assert list(cudart.registered.values()) == [lay_out_tensors(tensors)[1]]
    first = min(tensor.data_ptr() for tensor in tensors)
    assert list(cudart.registered) == [first]
    stage_from_gpu(cudart, staging, state)
    assert list(cudart.registered) == [first]
    with mock.patch.object(torch.cuda, "cudart", lambda: cudart):
        del staging
    assert cudart.registered == {}


def test_memory_that_cannot_be_registered_is_used_as_it_is_and_reported(caplog: pytest.LogCaptureFixture) -> None:
    state = trained_state()
    with caplog.at_level(logging.WARNING):
        snapshot = stage_from_gpu(Cudart(status=2), Staging(), state)
    assert torch.equal(snapshot.model["wte.weight"], state.model_tensors()["wte.weight"])
    (line,) = caplog.messages
    assert line == "checkpoints are copied through pageable memory: cudaHostRegister returned error 2"


@pytest.mark.parametrize("status", [0, 2])
def test_page_that_tries_whether_memory_can_be_pinned_is_freed(status: int) -> None:
    cudart = Cudart(status)
    with mock.patch.object(torch.cuda, "cudart", lambda: cudart):
        assert can_pin_memory() == (status == 0)
    assert cudart.registered == {}
