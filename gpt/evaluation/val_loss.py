"""The evaluation task of validation loss, perplexity and bits per byte."""

import math
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from itertools import islice

import torch
from torch import nn

from gpt.data.sequences import number_documents
from gpt.data.shards import TokenStream
from gpt.utils.distributed import DistContext
from gpt.utils.helper import IGNORED

# Shapes: B sequences of a batch, T = block_size.


class ValLoss:
    """Token-weighted loss over the whole validation set of each source, or over batches spread evenly over it.

    Every token of a set but the first is a target once, in consecutive windows of `block_size`. The last batch is
    padded, so that all have one shape. The ranks share the batches.

    Args:
        streams: validation tokens of each source, at least two per source.
        block_size: tokens of a window.
        batch_size: sequences per rank and forward pass.
        batches: number of batches of each set; 0 uses the whole set.
        document_mask: whether attention stays inside documents, as in training.
        autocast: context of the forward pass, as in training.
        dist: ranks that share the batches.
    """

    name = "val"

    def __init__(
        self,
        streams: Mapping[str, TokenStream],
        *,
        block_size: int,
        batch_size: int,
        batches: int,
        document_mask: bool,
        autocast: Callable[[], AbstractContextManager[object]],
        dist: DistContext,
    ):
        self._streams = streams
        self._block_size, self._batch_size, self._n_batches = block_size, batch_size, batches
        self._document_mask, self._autocast, self._dist = document_mask, autocast, dist

    @torch.no_grad()
    def run(self, model: nn.Module) -> dict[str, float]:
        """Return `val/loss` in nats per token, `val/perplexity`, and `val/bpb` in bits per byte of the original text.

        With several sources, also `val/loss/NAME` of each.
        """
        local_sums = [self._sum_nats(model, stream) for stream in self._streams.values()]
        sums = iter(self._dist.sum_on_host([number for numbers in local_sums for number in numbers]))
        losses = []
        for numbers in local_sums:
            *nats, n_evaluated = islice(sums, len(numbers))
            losses.append(math.fsum(nats) / n_evaluated)
        sizes = [len(stream) - 1 for stream in self._streams.values()]
        n_targets = sum(sizes)
        # Weighted by the size of each set, not by the tokens evaluated, so that few batches estimate the full value.
        loss = sum(loss * size for loss, size in zip(losses, sizes, strict=True)) / n_targets
        bits_per_token = loss / math.log(2)
        n_bytes = sum(stream.text_bytes for stream in self._streams.values())
        metrics = {"val/loss": loss, "val/perplexity": math.exp(min(loss, 700.0))}  # exp(710) overflows
        if n_bytes:
            metrics["val/bpb"] = bits_per_token * n_targets / n_bytes
        if len(self._streams) > 1:
            metrics |= {f"val/loss/{name}": loss for name, loss in zip(self._streams, losses, strict=True)}
        return metrics

    def _sum_nats(self, model: nn.Module, stream: TokenStream) -> list[float]:
        """Return the nats of every batch of a set, 0 for batches of other ranks, and last this rank's tokens.

        Adding zeros is exact, so the sum over ranks does not depend on which rank evaluated which batch.
        """
        n_windows = math.ceil((len(stream) - 1) / self._block_size)
        total = math.ceil(n_windows / self._batch_size)
        n_batches = min(self._n_batches or total, total)
        rank, world_size = self._dist.rank, self._dist.world_size
        # Every rank calls the model equally often, because a model may be sharded over them. What a rank evaluates past
        # the last batch does not count.
        own = range(rank, rank + math.ceil(n_batches / world_size) * world_size, world_size)
        losses, n_tokens = [], 0
        for position in own:
            tensors = self._get_batch(stream, min(position, n_batches - 1) * total // n_batches)
            with self._autocast():
                loss = model(*(self._to_device(tensor) for tensor in tensors))
            if position < n_batches:
                n_tokens += int((tensors[1] != IGNORED).sum())
                losses.append(loss)
        numbers = [0.0] * n_batches + [float(n_tokens)]
        if losses:
            numbers[own.start : n_batches : own.step] = torch.stack(losses).tolist()  # float64 on the host from here on
        return numbers

    def _to_device(self, tensor: torch.Tensor) -> torch.Tensor:
        """Copy a batch's tensor; a GPU copies it from pinned memory while the host prepares the next batch."""
        device = self._dist.device
        return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor.to(device)

    def _get_batch(self, stream: TokenStream, index: int) -> tuple[torch.Tensor, ...]:
        """Return batch `index` of a set: inputs, targets and, with a document mask, document numbers; each (B, T)."""
        span = self._batch_size * self._block_size
        start = index * span
        length = min(span, len(stream) - 1 - start)
        tokens = torch.from_numpy(stream.read(start, length + 1).astype("int64"))
        inputs = torch.zeros(span, dtype=torch.int64)
        targets = torch.full((span,), IGNORED)
        inputs[:length], targets[:length] = tokens[:-1], tokens[1:]
        tensors = [inputs, targets]
        if self._document_mask:
            documents = torch.zeros(span, dtype=torch.int64)
            numbers = torch.from_numpy(number_documents(stream, start, length))
            documents[:length], documents[length:] = numbers, int(numbers[-1]) + 1
            tensors.append(documents)
        return tuple(tensor.view(self._batch_size, self._block_size) for tensor in tensors)
