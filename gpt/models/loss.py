"""The training loss."""

import torch
import torch.nn.functional as F

from gpt.models.layers import soft_cap
from gpt.utils.helper import IGNORED

CHUNK_LOGITS = 2**22
"""Logits that are made at once: 16 MiB as float32, a block that allocators keep and do not map anew each time."""
LEAST_ROWS = 256
"""Rows below which the matrix product of a chunk would be inefficient."""


def head_loss(hidden: torch.Tensor, head: torch.Tensor, targets: torch.Tensor, *, softcap: float = 0.0) -> torch.Tensor:
    """Sum over targets of the negative log-likelihood in nats, computed in float32.

    A sum, not a mean: whoever knows how many tokens the whole step has, over all micro-batches and processes,
    divides by that number once. The logits are made chunk by chunk, never all of them in one block.

    Args:
        hidden: (B, T, C), any floating type.
        head: (V, C), the output embedding.
        targets: (B, T) int64; IGNORED ones add nothing.
        softcap: bounds the logits (see `soft_cap`); 0 does not.
    """
    rows = max(LEAST_ROWS, CHUNK_LOGITS // head.shape[0])
    chunks = zip(hidden.flatten(0, 1).split(rows), targets.flatten().split(rows), strict=True)
    losses = [
        F.cross_entropy(soft_cap(F.linear(x, head).float(), softcap), target, ignore_index=IGNORED, reduction="sum")
        for x, target in chunks
    ]
    return torch.stack(losses).sum()
