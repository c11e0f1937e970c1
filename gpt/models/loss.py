"""The training loss."""

import torch
import torch.nn.functional as F

IGNORED = -100
"""A target that is not counted: padding of the last validation window."""


def cross_entropy_sum(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Sum over targets of the negative log-likelihood in nats, computed in float32.

    A sum, not a mean: whoever knows how many tokens the whole step has, over all micro-batches and processes,
    divides by that number once.

    Args:
        logits: (B, T, V), any floating type.
        targets: (B, T) int64; IGNORED ones add nothing.
    """
    return F.cross_entropy(logits.flatten(0, 1).float(), targets.flatten(), ignore_index=IGNORED, reduction="sum")
