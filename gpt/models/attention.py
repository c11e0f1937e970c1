"""Causal attention: over whole rows, or inside each of the documents that a row holds.

Shapes: B rows, H heads, T tokens, D = width of a head. `documents` is (B, T) int64: for each position the number of its
document, non-decreasing along the row; padding at a row's end has a number of its own.
"""

import math
from collections.abc import Callable
from functools import cache
from importlib.util import find_spec
from typing import Any

import torch
import torch.nn.functional as F
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, flex_attention

HAS_TRITON = find_spec("triton") is not None
"""Whether FlexAttention's kernels can be compiled; torch for Windows comes without Triton."""
MATMUL_LONGEST = {torch.bfloat16: 512}
"""On a CPU, up to which length plain matrix products beat SDPA, by type; in others they do not.

Two to three times as fast up to 512 (docs/EXPERIMENTS.md); at 1,024 hardly, and T x T probabilities are kept.
"""
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
        self.hidden: torch.Tensor | None = None  # its opposite
        if _flex_serves(documents.device, dropout=dropout, head_width=head_width):
            self.blocks = _block_mask(documents)
        else:
            self.visible = (documents[:, None, :, None] == documents[:, None, None, :]).tril()
            self.hidden = ~self.visible


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
    out: torch.Tensor
    q, k, v = _as_autocast_would(q, k, v)
    if dropout == 0 and _matmul_wins(q) and (mask is None or mask.blocks is None):
        out = _MatmulAttention.apply(q, k, v, _future(q) if mask is None else mask.hidden)  # type: ignore[no-untyped-call]
        return out
    if mask is None:
        return F.scaled_dot_product_attention(q, k, v, dropout_p=dropout, is_causal=True)
    if mask.blocks is None:
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask.visible, dropout_p=dropout)
    out = _compiled(flex_attention)(q, k, v, block_mask=mask.blocks)
    return out


def _as_autocast_would(*tensors: torch.Tensor) -> list[torch.Tensor]:
    """In the type that autocast would have; a function of our own is not on its list."""
    device = tensors[0].device.type
    if not torch.is_autocast_enabled(device):
        return list(tensors)
    return [tensor.to(torch.get_autocast_dtype(device)) for tensor in tensors]


def _matmul_wins(q: torch.Tensor) -> bool:
    """Whether plain matrix products beat SDPA: see MATMUL_LONGEST."""
    return q.device.type == "cpu" and q.shape[2] <= MATMUL_LONGEST.get(q.dtype, 0)


def _future(q: torch.Tensor) -> torch.Tensor:
    """(T, T) bool: what a position must not see."""
    return torch.ones(q.shape[2], q.shape[2], dtype=torch.bool, device=q.device).triu(1)


def _scaled_bmm(a: torch.Tensor, b: torch.Tensor, scale: float) -> torch.Tensor:
    """The product of a and b times `scale`, which is applied before it is rounded."""
    return torch.baddbmm(a.new_empty(1, 1, 1), a, b, beta=0, alpha=scale)


class _MatmulAttention(torch.autograd.Function):
    """Attention as matrix products, with the probabilities kept for the backward pass.

    Scores and probabilities are rounded to the inputs' type, sums are made in float32, as transformers' eager attention
    has them.
    """

    @staticmethod
    def forward(ctx: Any, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, hidden: torch.Tensor) -> torch.Tensor:
        B, H, T, D = q.shape
        q, k, v = (x.reshape(B * H, T, D) for x in (q, k, v))
        scores = _scaled_bmm(q, k.transpose(1, 2), D**-0.5)  # (B * H, T, T)
        scores.view(B, H, T, T).masked_fill_(hidden, -math.inf)
        weights = torch.softmax(scores, -1)
        ctx.save_for_backward(q, k, v, weights)
        return torch.bmm(weights, v).view(B, H, T, D)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> Any:
        q, k, v, weights = ctx.saved_tensors
        B, H, T, D = grad.shape
        grad = grad.reshape(B * H, T, D)
        v_grad = torch.bmm(weights.transpose(1, 2), grad)
        weight_grad = torch.bmm(grad, v.transpose(1, 2))
        score_grad = torch._softmax_backward_data(weight_grad, weights, -1, weights.dtype)
        q_grad = _scaled_bmm(score_grad, k, D**-0.5)
        k_grad = _scaled_bmm(score_grad.transpose(1, 2), q, D**-0.5)
        return q_grad.view(B, H, T, D), k_grad.view(B, H, T, D), v_grad.view(B, H, T, D), None


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
