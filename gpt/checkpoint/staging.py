"""Host memory that a state is copied into, so that it can be written while training goes on."""

from collections.abc import Mapping

import torch

from gpt.checkpoint.app_state import AppState, Tensors
from gpt.checkpoint.store import Snapshot


class Staging:
    """Buffers that are allocated by the first copy and reused by all others.

    Fresh memory takes most of a copy's time: copying 1.6 GB took 2.9 s into new memory and 0.17 s into reused memory.
    """

    def __init__(self) -> None:
        self._model: Tensors = {}
        self._optimizer: Tensors = {}

    def copy(self, state: AppState, metrics: Mapping[str, float], world_size: int) -> Snapshot:
        """Return a snapshot that is valid until the next copy; waits once for the GPU."""
        model = _copy(state.model_tensors(), self._model)
        optimizer = _copy(state.optimizer_tensors(), self._optimizer)
        if any(tensor.is_cuda for tensor in state.model_tensors().values()):
            copied = torch.cuda.Event()
            copied.record()
            copied.synchronize()
        return Snapshot(model, optimizer, state.progress_json(), metrics, world_size)


def _copy(tensors: Tensors, buffers: Tensors) -> Tensors:
    for name in buffers.keys() - tensors.keys():
        del buffers[name]
    for name, tensor in tensors.items():
        buffer = buffers.get(name)
        if buffer is None or (buffer.shape, buffer.dtype) != (tensor.shape, tensor.dtype):
            buffer = buffers[name] = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=tensor.is_cuda)
        buffer.copy_(tensor, non_blocking=True)
    return dict(buffers)
