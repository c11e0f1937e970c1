"""The observer that finds a process whose weights are no longer those of the others."""

from collections import Counter
from collections.abc import Iterable, Sequence

import torch
from torch import nn

from gpt.configs.run_plan import RunPlan
from gpt.errors import UserError
from gpt.training.events import Command, Event, StepEnd, TrainStart
from gpt.training.observer import Observer
from gpt.utils.distributed import DistContext

CHUNK = 2**20
"""Elements that are digested at once: their weights and products stay small beside the model."""
INTEGERS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
"""By an element's size in bytes."""
ODD = 0x5851F42D4C957F2D
"""Knuth's multiplier (MMIX); any odd number is invertible modulo 2^64."""


class ReplicaGuard(Observer):
    """Compares digests of all weights, before the first step, on the steps that are due and before the plan's saves.

    A flipped bit stays in one process's weights and spoils the gradients of all, silently. Where the weights differ the
    run ends on every rank, before anything of this state is saved.

    Args:
        model: the bare module.
        interval: steps between two comparisons; 0 never compares.
        plan: says when a checkpoint is written.
        dist: the processes whose weights are compared.
    """

    def __init__(self, model: nn.Module, interval: int, plan: RunPlan, dist: DistContext):
        self._model, self._interval, self._plan, self._dist = model, interval, plan, dist

    def on_event(self, event: Event) -> Iterable[Command | Event]:
        """Compare, where it is time.

        Raises:
            UserError: names the ranks that differ.
        """
        if self._is_due(event):
            digests = self._dist.gather(int(digest(self._model.parameters())))
            differing = odd_ones_out(digests)
            if differing:
                ranks = " and ".join(f"rank {rank}" for rank in differing)
                others = "rank 0" if len(digests) == 2 else "the others"
                raise UserError(
                    f"the weights of {ranks} differ from those of {others} after step {event.step}; nothing of it is "
                    "saved: check that machine's memory; the same command goes on from the last checkpoint"
                )
        return ()

    def _is_due(self, event: Event) -> bool:
        if self._interval == 0 or self._dist.world_size == 1:
            return False
        if isinstance(event, StepEnd):
            return event.step % self._interval == 0 or self._plan.saves_at(event.step)
        return isinstance(event, TrainStart)


@torch.no_grad()
def digest(tensors: Iterable[torch.Tensor]) -> torch.Tensor:
    """A device scalar, int64, of every bit of `tensors` and its place.

    The i-th element of a chunk, taken as an integer, counts 2i + 1 times, modulo 2^64: so a change of one element
    always changes the sum, for an odd number has an inverse, and so does an exchange of two different ones, as the
    product of their difference and of their distance is below 2^64. A chunk's sum is added to the odd multiple of
    those before it.
    """
    total: torch.Tensor | None = None
    for tensor in tensors:
        flat = tensor.reshape(-1).view(INTEGERS[tensor.element_size()])
        for chunk in flat.split(CHUNK):
            places = torch.arange(1, 2 * len(chunk), 2, device=chunk.device)
            part = (chunk * places).sum()  # int64, which wraps
            total = part if total is None else total * ODD + part
    assert total is not None, "a model has weights"
    return total


def odd_ones_out(digests: Sequence[int]) -> list[int]:
    """Ranks whose digest is not that of the most; where no more than half agree, not that of rank 0."""
    (common, count), *_ = Counter(digests).most_common(1)
    if 2 * count <= len(digests):
        common = digests[0]
    return [rank for rank, found in enumerate(digests) if found != common]
