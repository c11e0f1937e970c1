"""Keys and values of the tokens that a model has read: generation computes each of them once.

Shapes: B rows, H heads, K heads of keys and values, T new tokens, S tokens up to the last new one, D = head_dim.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F

from gpt.configs.gpt_config import GPTConfig
from gpt.ops.attention import Attend, DocumentMask, attend


class KVCache:
    """Keys and values of every layer, allocated once; row r holds those of its first `lengths[r]` tokens.

    Args:
        config: resolved configuration of the model.
        n_rows: number of texts that are generated together.
        capacity: tokens of a row, at most config.block_size.
        dtype: dtype of keys and values.
        device: device of the model.
    """

    def __init__(
        self, config: GPTConfig, *, n_rows: int, capacity: int, dtype: torch.dtype, device: torch.device
    ) -> None:
        shape = (n_rows, config.n_kv_head, capacity, config.head_dim)
        self.capacity, self.device = capacity, device
        self.window = config.sliding_window or capacity
        self.lengths = [0] * n_rows
        # Zeros, because a masked value still meets a weight of 0, and 0 times NaN is NaN.
        self.keys = [torch.zeros(shape, dtype=dtype, device=device) for _ in range(config.n_layer)]
        self.values = [torch.zeros(shape, dtype=dtype, device=device) for _ in range(config.n_layer)]

    @property
    def n_bytes(self) -> int:
        """Bytes of all keys and values."""
        return sum(tensor.nbytes for tensor in (*self.keys, *self.values))

    def extend(self, rows: range, counts: Sequence[int]) -> "NewTokens":
        """Make room for new tokens and return what the model's forward pass needs to read them.

        Args:
            rows: consecutive rows; all empty, or each with one new token.
            counts: number of new tokens of each row; shorter rows are padded at their end.
        """
        starts = [self.lengths[row] for row in rows]
        n_new = max(counts)
        assert n_new == 1 or not any(starts), "several tokens at once only begin a row"
        assert max(starts) + n_new <= self.capacity, "the cache is full"
        for row, count in zip(rows, counts, strict=True):
            self.lengths[row] += count
        return NewTokens(self, rows, starts, counts)

    def move_row(self, source: int, target: int) -> None:
        """Move a row over another one; a row moved over itself is emptied."""
        length = self.lengths[source]
        if source != target:
            for tensor in (*self.keys, *self.values):
                tensor[target, :, :length] = tensor[source, :, :length]
        self.lengths[target], self.lengths[source] = length, 0


class NewTokens:
    """The next tokens of some rows, as the argument `cache` of the model's forward pass.

    Args:
        cache: receives their keys and values.
        rows: rows of the cache.
        starts: number of tokens that each row had.
        counts: number of new tokens of each row.
    """

    def __init__(self, cache: KVCache, rows: range, starts: Sequence[int], counts: Sequence[int]):
        n_new, end = max(counts), max(starts) + max(counts)
        self._counts, self._device = counts, cache.device
        first = torch.tensor(starts, device=cache.device)  # (B,)
        self.positions = first[:, None] + torch.arange(n_new, device=cache.device)  # (B, T)
        begin = max(0, min(starts) + 1 - cache.window)  # older keys are outside every window
        even = len(set(starts)) == 1
        place = _Place(
            rows=slice(rows.start, rows.stop),
            tokens=slice(starts[0], end) if even else None,
            positions=first,
            keys=slice(begin, end),
            is_first=not any(starts),
            allowed=None if even else _allow(first, torch.arange(begin, end, device=cache.device), cache.window),
        )
        self.layers: Sequence[Attend] = [
            partial(_attend_cached, keys, values, place) for keys, values in zip(cache.keys, cache.values, strict=True)
        ]

    def select_last(self, x: torch.Tensor) -> torch.Tensor:
        """Return each row's last new token, (B, T, C) -> (B, C)."""
        if len(set(self._counts)) == 1:
            return x[:, -1]
        last = torch.tensor(self._counts, device=self._device) - 1
        return x[torch.arange(len(x), device=self._device), last]


@dataclass(frozen=True)
class _Place:
    """The place of new tokens in a cache, the same in every layer."""

    rows: slice
    tokens: slice | None
    """Positions of the new tokens if they are the same in every row."""
    positions: torch.Tensor
    """(B,) int64, position of each row's first new token."""
    keys: slice
    """Positions that the new tokens attend to, if they are not the first."""
    is_first: bool
    """The rows were empty."""
    allowed: torch.Tensor | None
    """(B, 1, 1, S) bool, the keys that each row's only new token attends to; None: all."""


def _allow(positions: torch.Tensor, keys: torch.Tensor, window: int) -> torch.Tensor:
    """Return whether the token at each position, (B,), attends to each key, (S,), as (B, 1, 1, S) bool."""
    distances = positions[:, None, None, None] - keys
    return (distances >= 0) & (distances < window)


def _attend_cached(
    keys: torch.Tensor,
    values: torch.Tensor,
    place: _Place,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    mask: DocumentMask | None,
) -> torch.Tensor:
    """Store the new keys and values of a layer and attend to all; see `gpt.ops.attention.Attend`."""
    keys, values = keys[place.rows], values[place.rows]  # (B, K, capacity, D)
    q, k, v = q.to(keys.dtype), k.to(keys.dtype), v.to(keys.dtype)
    if place.tokens is not None:
        keys[:, :, place.tokens], values[:, :, place.tokens] = k, v
    else:  # one token per row, at positions that differ
        index = torch.arange(len(q), device=q.device)
        keys[index, :, place.positions], values[index, :, place.positions] = k[:, :, 0], v[:, :, 0]
    group_size = q.shape[1] // k.shape[1]
    if place.is_first and (mask is not None or q.device.type != "cpu"):
        return attend(q, k, v, mask, dropout=0.0)
    if place.is_first:  # without gradients torch's own is faster than the kernel of training (docs/EXPERIMENTS.md)
        return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=group_size > 1)
    return F.scaled_dot_product_attention(
        q,
        keys[:, :, place.keys],
        values[:, :, place.keys],
        attn_mask=place.allowed,
        enable_gqa=group_size > 1,
    )
