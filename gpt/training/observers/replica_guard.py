"""The observer that finds a rank whose weights differ from those of the others."""

from collections import Counter
from collections.abc import Iterable, Sequence

import torch
from torch import nn

from gpt.configs.run_plan import RunPlan
from gpt.errors import UserError
from gpt.training.events import Command, Event, StepEnd, TrainStart
from gpt.training.observer import Observer
from gpt.utils.distributed import DistContext

CHUNK_ELEMENTS = 2**20
"""Elements that are digested at a time, so that their int64 products need little memory."""
INTEGER_DTYPES = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
"""Size of an element in bytes -> dtype that views its bits."""
MULTIPLIER = 0x5851F42D4C957F2D
"""Knuth's multiplier (MMIX); any odd number is invertible modulo 2^64."""


class ReplicaGuard(Observer):
    """Compares digests of all weights before the first step, at an interval, and before each scheduled save.

    A flipped bit stays in the weights of one rank and silently spoils the gradients of all. If weights differ, the run
    ends on every rank before this state is saved.

    Args:
        model: the bare module.
        interval: steps between two comparisons; 0 never compares.
        plan: names the steps that are saved.
        dist: ranks whose weights are compared.
    """

    def __init__(self, model: nn.Module, interval: int, plan: RunPlan, dist: DistContext):
        self._model, self._interval, self._plan, self._dist = model, interval, plan, dist

    def on_event(self, event: Event) -> Iterable[Command | Event]:
        """Compare the weights if this step is due.

        Raises:
            UserError: the weights differ; names the ranks.
        """
        if self._is_due(event):
            digests = self._dist.gather(int(digest(self._model.parameters())))
            differing = find_differing_ranks(digests)
            if differing:
                ranks = " and ".join(f"rank {rank}" for rank in differing)
                others = "rank 0" if len(digests) == 2 else "the others"
                raise UserError(
                    f"the weights of {ranks} differ from those of {others} after step {event.step}, which is not "
                    "saved: check the memory of that machine; the same command resumes from the last checkpoint"
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
    """Return an int64 device scalar that depends on every bit of `tensors` and on its place.

        digest(chunk) = sum over i of (2 i + 1) * element_i  mod 2^64
        total = total * MULTIPLIER + digest(chunk)           mod 2^64

    A change of one element always changes the sum, because an odd factor has an inverse. So does an exchange of two
    different elements, because their difference times twice their distance is below 2^64.
    """
    total: torch.Tensor | None = None
    for tensor in tensors:
        flat = tensor.reshape(-1).view(INTEGER_DTYPES[tensor.element_size()])
        for chunk in flat.split(CHUNK_ELEMENTS):
            factors = torch.arange(1, 2 * len(chunk), 2, device=chunk.device)
            part = (chunk * factors).sum()  # int64, which wraps around
            total = part if total is None else total * MULTIPLIER + part
    assert total is not None, "a model has weights"
    return total


def find_differing_ranks(digests: Sequence[int]) -> list[int]:
    """Return the ranks whose digest is not that of the majority or, without a majority, not that of rank 0."""
    (common, count), *_ = Counter(digests).most_common(1)
    if 2 * count <= len(digests):
        common = digests[0]
    return [rank for rank, own in enumerate(digests) if own != common]
