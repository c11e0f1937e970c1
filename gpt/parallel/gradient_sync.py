"""Gradient synchronisation: the gradients of all micro-batches and ranks become the gradient of the step."""

from contextlib import AbstractContextManager, nullcontext
from typing import Protocol

from torch import nn
from torch.nn.parallel import DistributedDataParallel


class GradientSync(Protocol):
    """Accumulation of gradients over micro-batches and ranks, as the training step sees it."""

    @property
    def loss_factor(self) -> float:
        """Factor of each micro-batch's loss, such that the result is the gradient of their sum."""
        ...

    def micro_batch(self, *, is_last: bool) -> AbstractContextManager[object]:
        """Return a context for one micro-batch's forward and backward pass on this rank; they come in order."""
        ...

    def finish(self) -> None:
        """Make every parameter's `grad` that of the whole step, on every rank; call it after the last micro-batch."""
        ...


class AveragedGradients:
    """Gradients accumulated in `grad`, and averaged by DDP once per step, during the last backward pass.

    Args:
        model: the module that the step calls: a bare model, or DDP around it.
        world_size: number of ranks that DDP averages over.
    """

    def __init__(self, model: nn.Module, world_size: int):
        self._model, self._world_size = model, world_size

    @property
    def loss_factor(self) -> float:
        """World size, which turns DDP's mean into a sum."""
        return float(self._world_size)

    def micro_batch(self, *, is_last: bool) -> AbstractContextManager[object]:
        """Return DDP's `no_sync` context, except for the last micro-batch."""
        if is_last or not isinstance(self._model, DistributedDataParallel):
            return nullcontext()
        return self._model.no_sync()

    def finish(self) -> None:
        """Do nothing: DDP has averaged already."""
