"""Causal attention: over whole rows, or inside each of the documents that a row holds.

Shapes: B rows, H heads, T tokens, D = width of a head. `documents` is (B, T) int64: for each position the number of its
document, non-decreasing along the row; padding at a row's end has a number of its own.
"""

from collections.abc import Callable
from functools import cache
from importlib.util import find_spec
from typing import Any

import torch
import torch.nn.functional as F
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, flex_attention

HAS_TRITON = find_spec("triton") is not None
"""Whether FlexAttention's kernels can be compiled; torch for Windows comes without Triton."""
FLEX_LEAST_WIDTH = 16
"""Narrower heads than Triton's product of matrices takes (torch/_inductor/kernel/flex/flex_attention.py)."""


class DocumentMask:
    """Who sees whom where rows hold several documents: made once in a forward pass, for all its layers.

    On CUDA it holds FlexAttention's blocks (Dong et al. 2024, "Flex Attention"): those in which nobody sees anybody are
    skipped, and no layer holds T x T of anything. Elsewhere, and where FlexAttention cannot serve, it holds a boolean
    for each pair of positions. With these, nothing of one document reaches another, to the bit: what is masked has the
    weight exp(-inf) = 0, and 0 times a finite number, added to a sum, leaves it as it was, forward and backward.

    Of the exact ways on a CPU this is not always the fastest: a call for each document takes half the time in rows of
    1024 and twice the time in rows of 128. But it needs the lengths on the host, and a compiled model would be compiled
    anew for each layout.

    Args:
        documents: (B, T) int64.
        dropout: probability that a layer drops a weight of attention in this pass.
        head_width: D.
    """

    def __init__(self, documents: torch.Tensor, *, dropout: float, head_width: int):
        self.blocks: BlockMask | None = None
        self.visible: torch.Tensor | None = None  # (B, 1, T, T) bool, the same for every head
        if _flex_serves(documents.device, dropout=dropout, head_width=head_width):
            self.blocks = _block_mask(documents)
        else:
            self.visible = (documents[:, None, :, None] == documents[:, None, None, :]).tril()


def attend(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: DocumentMask | None, *, dropout: float
) -> torch.Tensor:
    """Causal attention: the one function that every layer calls.

    Args:
        q: (B, H, T, D), queries.
        k: (B, H, T, D), keys.
        v: (B, H, T, D), values.
        mask: made for these rows, this width and this dropout; with None a position sees all of its row before it.
        dropout: probability that a weight is dropped.

    Returns:
        (B, H, T, D).
    """
    if mask is None:
        return F.scaled_dot_product_attention(q, k, v, dropout_p=dropout, is_causal=True)
    if mask.blocks is None:
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask.visible, dropout_p=dropout)
    out: torch.Tensor = _compiled(flex_attention)(q, k, v, block_mask=mask.blocks)
    return out


def positions_in_documents(documents: torch.Tensor) -> torch.Tensor:
    """(B, T) int64 -> (B, T) int64: every position counted from the first of its document in the row; no host sync."""
    index = torch.arange(documents.shape[1], device=documents.device)  # (T,)
    begins = documents.diff(dim=1, prepend=documents[:, :1]) != 0  # (B, T); the row's first stays False: it is at 0
    return index - torch.where(begins, index, 0).cummax(dim=1).values


def _flex_serves(device: torch.device, *, dropout: float, head_width: int) -> bool:
    # FlexAttention has no dropout, and no backward pass on a CPU or on MPS.
    return device.type == "cuda" and HAS_TRITON and dropout == 0 and head_width >= FLEX_LEAST_WIDTH


def _block_mask(documents: torch.Tensor) -> BlockMask:
    def visible(b: torch.Tensor, h: torch.Tensor, q: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
        return (q >= k) & (documents[b, q] == documents[b, k])

    B, T = documents.shape
    blocks: BlockMask = _compiled(create_block_mask)(visible, B, None, T, T, device=documents.device)
    return blocks


def _compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    # FlexAttention uncompiled holds all T x T scores. Where the model itself is compiled, this is being traced, and the
    # function as it is becomes a part of the model's graph.
    return function if torch.compiler.is_compiling() else _compile(function)


@cache
def _compile(function: Callable[..., Any]) -> Callable[..., Any]:
    return torch.compile(function)
