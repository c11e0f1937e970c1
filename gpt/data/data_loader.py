"""Global step -> this process's micro-batches, fetched one step ahead by a thread."""

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Self

import torch

from gpt.configs.batch_plan import BatchPlan
from gpt.data.quarantine import Quarantine
from gpt.data.sequences import Sequences

# Shapes: B sequences of a micro-batch, T = block_size.


@dataclass(frozen=True)
class MicroBatch:
    """One forward pass's worth of training data."""

    index: int
    """Which micro-batch of the step it is, over all processes; the address of its random draws."""
    inputs: torch.Tensor
    """(B, T) int64."""
    targets: torch.Tensor
    """(B, T) int64: the token after each input; IGNORED where there is none."""
    documents: torch.Tensor | None = None
    """(B, T) int64: the number, within its sequence, of each position's document; None: attention is not confined."""


@dataclass(frozen=True)
class StepBatch:
    """What one process trains on in one step."""

    micro_batches: tuple[MicroBatch, ...]
    n_targets: int
    """Tokens that the whole step predicts, over all processes."""


@dataclass(frozen=True)
class _Fetched:
    tensors: tuple[torch.Tensor, ...]
    """Inputs, targets and, where there are any, documents: (grad_accum_steps * B, T) each."""
    n_targets: int


class DataLoader:
    """Batches as a function of the step and the quarantine: no state to save, and no worker process to leak.

    Args:
        sequences: of the run, in its order.
        batch: how a step's are cut up.
        rank: of this process.
        device: where batches are put.
        quarantine: global batches to leave out; it may grow.
        waiting: a context for the time in which the step waits for its batch.
    """

    def __init__(
        self,
        sequences: Sequences,
        batch: BatchPlan,
        *,
        rank: int,
        device: torch.device,
        quarantine: Quarantine | None = None,
        waiting: Callable[[], AbstractContextManager[object]] = nullcontext,
    ):
        self._sequences = sequences
        self._quarantine = quarantine or Quarantine()
        self._batch = batch
        self._first = rank * batch.grad_accum_steps
        self._device = device
        self._waiting = waiting
        # Pinning uses the thread's current GPU; without being told it, every rank's thread would open the first one.
        told = (torch.cuda.set_device, (device,)) if device.type == "cuda" else (None, ())
        self._thread = ThreadPoolExecutor(1, "data-loader", *told)
        self._ahead: tuple[int, Future[_Fetched]] | None = None

    def batch_of(self, step: int) -> StepBatch:
        """This process's part of the step's global batch, on the device; the next step's is fetched meanwhile."""
        now, after = self._quarantine.batch_of(step), self._quarantine.batch_of(step + 1)
        with self._waiting():
            ahead = self._ahead
            fetched = ahead[1].result() if ahead is not None and ahead[0] == now else self._fetch(now)
        self._ahead = (after, self._thread.submit(self._fetch, after))
        size = self._batch.micro_batch_size
        pieces = zip(
            *(tensor.to(self._device, non_blocking=True).split(size) for tensor in fetched.tensors), strict=True
        )
        micro_batches = tuple(MicroBatch(self._first + index, *tensors) for index, tensors in enumerate(pieces))
        return StepBatch(micro_batches, fetched.n_targets)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        """End the thread."""
        self._thread.shutdown(wait=True, cancel_futures=True)

    def _fetch(self, index: int) -> _Fetched:
        """The sequences of this process in global batch `index`; pinned where a GPU will copy them."""
        batch = self._batch
        first = index * batch.sequences_per_step
        rows = self._sequences.read(
            first + self._first * batch.micro_batch_size, batch.grad_accum_steps * batch.micro_batch_size
        )
        arrays = (rows.inputs, rows.targets) if rows.documents is None else (rows.inputs, rows.targets, rows.documents)
        tensors = tuple(torch.from_numpy(array) for array in arrays)
        if self._device.type == "cuda":
            tensors = tuple(tensor.pin_memory() for tensor in tensors)
        return _Fetched(tensors, self._sequences.count_targets(first, batch.sequences_per_step))
