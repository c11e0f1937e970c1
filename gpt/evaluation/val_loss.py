"""Loss, perplexity and bits per byte on a fixed set of tokens."""

import math
from collections.abc import Callable
from contextlib import AbstractContextManager

import torch
from torch import nn

from gpt.data.shards import TokenStream
from gpt.models.loss import IGNORED
from gpt.utils.distributed import DistContext

# Shapes: B sequences of a batch, T = block_size.


class ValLoss:
    """Token-weighted loss over the whole set, or over batches spread evenly over it; the work is shared by all ranks.

    Every token but the very first is a target once, in windows of `block_size` that follow each other; the last
    batch is padded, so that all have one shape.

    Args:
        stream: the validation tokens, at least two.
        n_bytes: length of their text, for bits per byte: loss in bits per token times tokens per byte.
        block_size: window length.
        batch_size: sequences per forward pass and rank.
        batches: how many batches to use; 0: the whole set.
        autocast: context of the forward pass, the same as in training.
        dist: the processes that share the work.
    """

    name = "val"

    def __init__(
        self,
        stream: TokenStream,
        n_bytes: int,
        *,
        block_size: int,
        batch_size: int,
        batches: int,
        autocast: Callable[[], AbstractContextManager[object]],
        dist: DistContext,
    ):
        self._stream, self._n_bytes = stream, n_bytes
        self._block_size, self._batch_size = block_size, batch_size
        self._autocast, self._dist = autocast, dist
        n_windows = math.ceil((len(stream) - 1) / block_size)
        total = math.ceil(n_windows / batch_size)
        used = min(batches or total, total)
        self._batches = [index * total // used for index in range(used)]

    @torch.no_grad()
    def run(self, model: nn.Module) -> dict[str, float]:
        """`val/loss` in nats per token, `val/perplexity`, `val/bpb` in bits per byte of the original text."""
        sums, n_tokens = [], 0
        for index in self._batches[self._dist.rank :: self._dist.world_size]:
            inputs, targets = self._batch(index)
            with self._autocast():
                sums.append(model(inputs.to(self._dist.device), targets.to(self._dist.device)))
            n_tokens += int((targets != IGNORED).sum())
        # float64 on the CPU: a float32 sum over a large set loses digits, and not every device has float64.
        total = torch.stack(sums).cpu().double().sum() if sums else torch.zeros((), dtype=torch.float64)
        nats, counted = self._dist.sum_on_host([float(total), float(n_tokens)])
        loss = nats / counted
        bits_per_token = loss / math.log(2)
        return {
            "val/loss": loss,
            "val/perplexity": math.exp(min(loss, 700.0)),
            "val/bpb": bits_per_token * (len(self._stream) - 1) / self._n_bytes,
        }

    def _batch(self, index: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Batch `index` of the set: inputs and targets, (B, T) each."""
        span = self._batch_size * self._block_size
        start = index * span
        length = min(span, len(self._stream) - 1 - start)
        tokens = torch.from_numpy(self._stream.read(start, length + 1).astype("int64"))
        inputs = torch.zeros(span, dtype=torch.int64)
        targets = torch.full((span,), IGNORED)
        inputs[:length], targets[:length] = tokens[:-1], tokens[1:]
        shape = (self._batch_size, self._block_size)
        return inputs.view(shape), targets.view(shape)
