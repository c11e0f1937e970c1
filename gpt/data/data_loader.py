"""Step -> this rank's micro-batches, fetched one step ahead by a thread."""

from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Self

import torch

from gpt.configs.batch_plan import BatchPlan
from gpt.data.quarantine import Quarantine
from gpt.data.sequences import Sequences

# Shapes: B = micro_batch_size, T = block_size.


@dataclass(frozen=True)
class MicroBatch:
    """Data of one forward pass."""

    index: int
    """Number of the micro-batch in its step, over all ranks: part of the address of its random bits."""
    inputs: torch.Tensor
    """(B, T) int64."""
    targets: torch.Tensor
    """(B, T) int64: the token after each input; IGNORED if there is none."""
    documents: torch.Tensor | None = None
    """(B, T) int64: number of each position's document within its sequence; None without a document mask."""


@dataclass(frozen=True)
class StepBatch:
    """One rank's part of a step's global batch."""

    micro_batches: tuple[MicroBatch, ...]
    n_targets: int
    """Tokens that the whole step predicts, over all ranks."""


@dataclass(frozen=True)
class _FetchedBatch:
    tensors: tuple[torch.Tensor, ...]
    """Inputs, targets and, with a document mask, documents: (grad_accum_steps * B, T) each."""
    n_targets: int


class DataLoader:
    """Batches as a function of the step and the quarantine: there is no state to save and no worker process to lose.

    Args:
        sequences: of the run, in its order.
        batch: sizes that a step is cut into.
        rank: of this process.
        device: that batches are put on.
        quarantine: global batches to leave out; may grow during the run.
    """

    def __init__(
        self,
        sequences: Sequences,
        batch: BatchPlan,
        *,
        rank: int,
        device: torch.device,
        quarantine: Quarantine | None = None,
    ):
        self._sequences = sequences
        self._quarantine = quarantine or Quarantine()
        self._batch = batch
        self._first_micro_batch = rank * batch.grad_accum_steps
        self._device = device
        # Pinning uses the thread's current GPU, which would be the first one for every rank's thread.
        set_device = (torch.cuda.set_device, (device,)) if device.type == "cuda" else (None, ())
        self._thread = ThreadPoolExecutor(1, "data-loader", *set_device)
        self._ahead: tuple[int, Future[_FetchedBatch]] | None = None

    def get_batch(self, step: int) -> StepBatch:
        """Return this rank's part of the step's global batch, on the device; start to fetch the next step's."""
        index, next_index = self._quarantine.find_batch(step), self._quarantine.find_batch(step + 1)
        ahead = self._ahead
        fetched = ahead[1].result() if ahead is not None and ahead[0] == index else self._fetch(index)
        self._ahead = (next_index, self._thread.submit(self._fetch, next_index))
        size = self._batch.micro_batch_size
        micro_batches = zip(
            *(tensor.to(self._device, non_blocking=True).split(size) for tensor in fetched.tensors), strict=True
        )
        return StepBatch(
            tuple(MicroBatch(self._first_micro_batch + i, *tensors) for i, tensors in enumerate(micro_batches)),
            fetched.n_targets,
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def close(self) -> None:
        """End the thread."""
        self._thread.shutdown(wait=True, cancel_futures=True)

    def _fetch(self, index: int) -> _FetchedBatch:
        """Read this rank's sequences of global batch `index`, into pinned memory if a GPU will copy them."""
        batch = self._batch
        first = index * batch.sequences_per_step
        arrays = self._sequences.read(
            first + self._first_micro_batch * batch.micro_batch_size, batch.grad_accum_steps * batch.micro_batch_size
        )
        parts = (arrays.inputs, arrays.targets, *(() if arrays.documents is None else (arrays.documents,)))
        tensors = tuple(torch.from_numpy(part) for part in parts)
        if self._device.type == "cuda":
            tensors = tuple(tensor.pin_memory() for tensor in tensors)
        return _FetchedBatch(tensors, self._sequences.count_targets(first, batch.sequences_per_step))
