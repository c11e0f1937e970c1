"""When gradients are exchanged between processes: once per step, with the last micro-batch."""

from contextlib import AbstractContextManager, nullcontext

from torch import nn
from torch.nn.parallel import DistributedDataParallel


def gradient_sync(model: nn.Module, *, is_last: bool) -> AbstractContextManager[object]:
    """A context for the forward and backward pass of one micro-batch."""
    if is_last or not isinstance(model, DistributedDataParallel):
        return nullcontext()
    return model.no_sync()
