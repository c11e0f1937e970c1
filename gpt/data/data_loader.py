"""Global step -> this process's micro-batches, fetched one step ahead by a thread."""

from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Self

import numpy as np
import torch

from gpt.configs.run_plan import BatchPlan
from gpt.data.sampler import window_starts
from gpt.data.shards import TokenStream

# Shapes: B sequences of a micro-batch, T = block_size.


@dataclass(frozen=True)
class MicroBatch:
    """One forward pass's worth of training data."""

    index: int
    """Which micro-batch of the step it is, over all processes; the address of its random draws."""
    inputs: torch.Tensor
    """(B, T) int64."""
    targets: torch.Tensor
    """(B, T) int64: the token after each input."""


class DataLoader:
    """Batches as a function of the step: there is no state to save, and no worker process to leak."""

    def __init__(self, stream: TokenStream, batch: BatchPlan, *, seed: int, rank: int, device: torch.device):
        self._stream = stream
        self._batch = batch
        self._seed = seed
        self._first = rank * batch.grad_accum_steps
        self._device = device
        # Pinning uses the thread's current GPU; without being told it, every rank's thread would open the first one.
        told = (torch.cuda.set_device, (device,)) if device.type == "cuda" else (None, ())
        self._thread = ThreadPoolExecutor(1, "data-loader", *told)
        self._ahead: tuple[int, Future[torch.Tensor]] | None = None

    def batches_of(self, step: int) -> list[MicroBatch]:
        """This process's micro-batches of global batch `step`, on the device; the next step is fetched meanwhile."""
        windows = self._ahead[1].result() if self._ahead is not None and self._ahead[0] == step else self._fetch(step)
        self._ahead = (step + 1, self._thread.submit(self._fetch, step + 1))
        windows = windows.to(self._device, non_blocking=True)
        return [
            MicroBatch(self._first + index, chunk[:, :-1].contiguous(), chunk[:, 1:].contiguous())
            for index, chunk in enumerate(windows.split(self._batch.micro_batch_size))
        ]

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        """End the thread."""
        self._thread.shutdown(wait=True, cancel_futures=True)

    def _fetch(self, step: int) -> torch.Tensor:
        """The sequences of this process, (grad_accum_steps * B, T + 1); pinned where a GPU will copy them."""
        batch = self._batch
        starts = window_starts(
            self._seed,
            step * batch.sequences_per_step + self._first * batch.micro_batch_size,
            batch.grad_accum_steps * batch.micro_batch_size,
            len(self._stream),
            batch.block_size,
        )
        rows = np.empty((len(starts), batch.block_size + 1), dtype=np.int64)
        for row, start in zip(rows, starts, strict=True):
            row[:] = self._stream.read(int(start), batch.block_size + 1)
        windows = torch.from_numpy(rows)
        return windows.pin_memory() if self._device.type == "cuda" else windows
