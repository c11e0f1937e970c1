"""How the gradients of a step's micro-batches, over all processes, become the gradient of the step."""

from contextlib import AbstractContextManager, nullcontext
from typing import Protocol

from torch import nn
from torch.nn.parallel import DistributedDataParallel


class GradientSync(Protocol):
    """Accumulates gradients over micro-batches and processes; the training step does not know how."""

    @property
    def loss_factor(self) -> float:
        """What each micro-batch's loss is multiplied by, so that the result is the gradient of their sum."""
        ...

    def micro_batch(self, *, is_last: bool) -> AbstractContextManager[object]:
        """A context for the forward and backward pass of one micro-batch of this process; they come in order."""
        ...

    def finish(self) -> None:
        """After the last micro-batch: every parameter's `grad` becomes that of the whole step, on every process."""
        ...


class AveragedGradients:
    """Added up in `grad`, and averaged by DDP, once per step, while the last backward pass still runs.

    Args:
        model: what the step calls: a bare module, or DDP around it.
        world_size: processes that DDP averages over.
    """

    def __init__(self, model: nn.Module, world_size: int):
        self._model, self._world_size = model, world_size

    @property
    def loss_factor(self) -> float:
        """Makes of DDP's mean a sum."""
        return float(self._world_size)

    def micro_batch(self, *, is_last: bool) -> AbstractContextManager[object]:
        """Exchange gradients in the last one alone."""
        if is_last or not isinstance(self._model, DistributedDataParallel):
            return nullcontext()
        return self._model.no_sync()

    def finish(self) -> None:
        """DDP has done it."""
