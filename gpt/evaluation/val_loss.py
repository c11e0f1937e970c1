"""Loss, perplexity and bits per byte on fixed sets of tokens."""

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
    """Token-weighted loss over whole sets, or over batches spread evenly over each; the work is shared by all ranks.

    Every token of a set but the very first is a target once, in windows of `block_size` that follow each other; the
    last batch is padded, so that all have one shape.

    Args:
        streams: the validation tokens of each source, at least two of each.
        block_size: window length.
        batch_size: sequences per forward pass and rank.
        batches: how many batches of each set to use; 0: the whole set.
        masked: whether attention is kept inside documents, as in training.
        autocast: context of the forward pass, the same as in training.
        dist: the processes that share the work.
    """

    name = "val"

    def __init__(
        self,
        streams: Mapping[str, TokenStream],
        *,
        block_size: int,
        batch_size: int,
        batches: int,
        masked: bool,
        autocast: Callable[[], AbstractContextManager[object]],
        dist: DistContext,
    ):
        self._streams = streams
        self._block_size, self._batch_size, self._batches = block_size, batch_size, batches
        self._masked, self._autocast, self._dist = masked, autocast, dist

    @torch.no_grad()
    def run(self, model: nn.Module) -> dict[str, float]:
        """`val/loss` in nats per token, `val/perplexity`, `val/bpb` in bits per byte of the original text.

        Of several sources also `val/loss/NAME` of each.
        """
        read = [self._read(model, stream) for stream in self._streams.values()]
        reduced = iter(self._dist.sum_on_host([number for numbers in read for number in numbers]))
        losses = []
        for numbers in read:
            *nats, counted = islice(reduced, len(numbers))
            losses.append(math.fsum(nats) / counted)
        sizes = [len(stream) - 1 for stream in self._streams.values()]
        n_targets = sum(sizes)
        # By the sets' sizes, not by what was read of each: then a few batches estimate what all of them would give.
        loss = sum(loss * size for loss, size in zip(losses, sizes, strict=True)) / n_targets
        bits_per_token = loss / math.log(2)
        n_bytes = sum(stream.text_bytes for stream in self._streams.values())
        metrics = {"val/loss": loss, "val/perplexity": math.exp(min(loss, 700.0))}
        if n_bytes:
            metrics["val/bpb"] = bits_per_token * n_targets / n_bytes
        if len(self._streams) > 1:
            metrics |= {f"val/loss/{name}": loss for name, loss in zip(self._streams, losses, strict=True)}
        return metrics

    def _read(self, model: nn.Module, stream: TokenStream) -> list[float]:
        """Nats of every batch of a set, 0 for those that are not this rank's; last the tokens that this rank read.

        Sums over the ranks then lose no digit, and what is made of them does not depend on who read what.
        """
        n_windows = math.ceil((len(stream) - 1) / self._block_size)
        total = math.ceil(n_windows / self._batch_size)
        used = min(self._batches or total, total)
        mine = range(self._dist.rank, used, self._dist.world_size)
        sums, n_tokens = [], 0
        for turn in mine:
            tensors = self._batch(stream, turn * total // used)
            n_tokens += int((tensors[1] != IGNORED).sum())
            with self._autocast():
                sums.append(model(*(tensor.to(self._dist.device) for tensor in tensors)))
        numbers = [0.0] * used + [float(n_tokens)]
        if sums:
            numbers[mine.start : used : mine.step] = torch.stack(sums).tolist()  # float64 from here on, on the host
        return numbers

    def _batch(self, stream: TokenStream, index: int) -> tuple[torch.Tensor, ...]:
        """Batch `index` of a set: inputs, targets and, with a mask, document numbers; (B, T) each."""
        span = self._batch_size * self._block_size
        start = index * span
        length = min(span, len(stream) - 1 - start)
        tokens = torch.from_numpy(stream.read(start, length + 1).astype("int64"))
        inputs = torch.zeros(span, dtype=torch.int64)
        targets = torch.full((span,), IGNORED)
        inputs[:length], targets[:length] = tokens[:-1], tokens[1:]
        tensors = [inputs, targets]
        if self._masked:
            documents = torch.zeros(span, dtype=torch.int64)
            numbers = torch.from_numpy(number_documents(stream, start, length))
            documents[:length], documents[length:] = numbers, int(numbers[-1]) + 1
            tensors.append(documents)
        return tuple(tensor.view(self._batch_size, self._block_size) for tensor in tensors)
