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
from torch.autograd.function import once_differentiable
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, flex_attention

from gpt.ops import attention_cpu as kernel
from gpt.ops.precision import to_compute_dtype

HAS_TRITON = find_spec("triton") is not None
"""Whether FlexAttention's kernels can be compiled; torch for Windows comes without Triton."""
MATMUL_TYPES = frozenset({torch.bfloat16})
"""Types in which, on a CPU, matrix products of our own beat SDPA; in float32 they do not (docs/EXPERIMENTS.md). Where
`gpt.ops.attention_cpu` serves, it takes 0.4 times as long as they do."""
QUERIES = 256
"""Of a row, whose scores are made at once: what lies after them is not computed at all."""
SAVE_WEIGHTS_MAX_LEN = 512
"""Up to which length weights are kept for the backward pass; of longer rows, in which they would be most of what a
model keeps, they are made again there."""
FLEX_MIN_HEAD_DIM = 16
"""Narrower heads than Triton's product of matrices takes (torch/_inductor/kernel/flex/flex_attention.py)."""


class DocumentMask:
    """Who sees whom where rows hold several documents: made once in a forward pass, for all its layers.

    On CUDA it holds FlexAttention's blocks (Dong et al. 2024, "Flex Attention"): those in which nobody sees anybody are
    skipped, and no layer holds T x T of anything. So it is with `gpt.ops.attention_cpu`, for which it holds where
    documents begin. Elsewhere, and where neither can serve, it holds a boolean for each pair of positions. With all of
    these, nothing of one document reaches another, to the bit: what is masked has the weight exp(-inf) = 0, and 0 times
    a finite number, added to a sum, leaves it as it was, forward and backward.

    Of the exact ways on a CPU the booleans are not always the fastest: a call for each document takes half the time in
    rows of 1024 and twice the time in rows of 128. But it needs the lengths on the host, and a compiled model would be
    compiled anew for each layout.

    Args:
        documents: (B, T) int64.
        dropout: probability that a layer drops a weight of attention in this pass.
        head_dim: D.
        dtype: of queries, keys and values.
    """

    def __init__(self, documents: torch.Tensor, *, dropout: float, head_dim: int, dtype: torch.dtype):
        self.blocks: BlockMask | None = None
        self.begins: torch.Tensor | None = None  # (B, T) int32, the first position of each one's document
        self.visible: torch.Tensor | None = None  # (B, 1, T, T) bool, the same for every head
        self.hidden: torch.Tensor | None = None  # its opposite
        if _flex_serves(documents.device, dropout=dropout, head_dim=head_dim):
            self.blocks = _block_mask(documents)
        elif _kernel_serves(documents.device, dtype, dropout=dropout, head_dim=head_dim):
            index = torch.arange(documents.shape[1], device=documents.device)  # (T,)
            self.begins = (index - positions_in_documents(documents)).int()
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
    q, k, v = to_compute_dtype(q, k, v)
    if mask is None:
        by_kernel = _kernel_serves(q.device, q.dtype, dropout=dropout, head_dim=q.shape[3])
    else:
        by_kernel = mask.begins is not None
    if by_kernel:
        out = _KernelAttention.apply(q, k, v, mask and mask.begins)  # type: ignore[no-untyped-call]
        return out
    if dropout == 0 and q.device.type == "cpu" and q.dtype in MATMUL_TYPES:
        out = _MatmulAttention.apply(q, k, v, mask and mask.hidden)  # type: ignore[no-untyped-call]
        return out
    if mask is None:
        return F.scaled_dot_product_attention(q, k, v, dropout_p=dropout, is_causal=True)
    if mask.blocks is None:
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask.visible, dropout_p=dropout)
    out = _compiled(flex_attention)(q, k, v, block_mask=mask.blocks)
    return out


class _KernelAttention(torch.autograd.Function):
    """What `gpt.ops.attention_cpu` computes; weights are kept nowhere, and the backward pass makes them again."""

    @staticmethod
    def forward(
        ctx: Any, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, begins: torch.Tensor | None
    ) -> torch.Tensor:
        saved = kernel.forward(q, k, v, begins)
        ctx.save_for_backward(*saved)
        return saved.out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> Any:
        return *kernel.backward(kernel.Saved(*ctx.saved_tensors), grad), None


class _MatmulAttention(torch.autograd.Function):
    """Attention as matrix products, for a block of queries at a time, with what they may see and no more.

    Scores and weights are rounded to the inputs' type, sums are made in float32, as transformers' eager attention has
    them. Shapes: N = B * H, R queries of a block, S keys up to the last of them.
    """

    @staticmethod
    def forward(
        ctx: Any, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, hidden: torch.Tensor | None
    ) -> torch.Tensor:
        B, H, T, D = q.shape
        q, k, v = (x.reshape(B * H, T, D) for x in (q, k, v))
        out, kept = torch.empty_like(q), []
        for rows in _blocks(T):
            weights = _weights(q, k, rows, hidden)  # (N, R, S)
            torch.bmm(weights, v[:, : rows.stop], out=out[:, rows])
            if T <= SAVE_WEIGHTS_MAX_LEN:
                kept.append(weights)
        ctx.save_for_backward(q, k, v, hidden, *kept)
        return out.view(B, H, T, D)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> Any:
        q, k, v, hidden, *kept = ctx.saved_tensors
        B, H, T, D = grad.shape
        grad = grad.reshape(B * H, T, D)
        q_grads, blocks = [], _blocks(T)
        k_grad: torch.Tensor | None = None
        v_grad: torch.Tensor | None = None
        for index, rows in reversed([*enumerate(blocks)]):  # the last one sees every key
            weights = kept[index] if kept else _weights(q, k, rows, hidden)  # (N, R, S)
            weight_grad = torch.bmm(grad[:, rows], v[:, : rows.stop].transpose(1, 2))
            score_grad = torch._softmax_backward_data(weight_grad, weights, -1, weights.dtype)
            q_grads.append(_scaled_bmm(score_grad, k[:, : rows.stop], D**-0.5))  # (N, R, D)
            k_grad = _plus(k_grad, _scaled_bmm(score_grad.transpose(1, 2), q[:, rows], D**-0.5), len(blocks))
            v_grad = _plus(v_grad, torch.bmm(weights.transpose(1, 2), grad[:, rows]), len(blocks))
        q_grad = q_grads[0] if len(blocks) == 1 else torch.cat(q_grads[::-1], 1)
        return *(x.to(q.dtype).view(B, H, T, D) for x in (q_grad, k_grad, v_grad) if x is not None), None


def _plus(total: torch.Tensor | None, part: torch.Tensor, n_parts: int) -> torch.Tensor:
    """(N, T, D) `total`, the first (N, S, D) of it increased in place by `part`; several are summed in float32."""
    if total is None:
        return part if n_parts == 1 else part.float()
    total[:, : part.shape[1]] += part
    return total


def _blocks(length: int) -> list[slice]:
    """Which queries are taken together."""
    return [slice(start, min(start + QUERIES, length)) for start in range(0, length, QUERIES)]


def _weights(q: torch.Tensor, k: torch.Tensor, rows: slice, hidden: torch.Tensor | None) -> torch.Tensor:
    """(N, R, S): how much each of the queries `rows` takes from each key up to the last of them.

    Args:
        q: (N, T, D).
        k: (N, T, D).
        rows: which queries.
        hidden: (B, 1, T, T) bool, whom a position does not see; None: those after it.
    """
    scores = _scaled_bmm(q[:, rows], k[:, : rows.stop].transpose(1, 2), q.shape[2] ** -0.5)
    if hidden is None:
        n = rows.stop - rows.start
        scores[:, :, rows] += torch.full((n, n), -math.inf, dtype=scores.dtype, device=scores.device).triu(1)
    else:
        scores.view(hidden.shape[0], -1, *scores.shape[1:]).masked_fill_(hidden[:, :, rows, : rows.stop], -math.inf)
    return torch.softmax(scores, -1)


def _scaled_bmm(a: torch.Tensor, b: torch.Tensor, scale: float) -> torch.Tensor:
    """The product of a and b times `scale`, which is applied before it is rounded."""
    return torch.baddbmm(a.new_empty(1, 1, 1), a, b, beta=0, alpha=scale)


def positions_in_documents(documents: torch.Tensor) -> torch.Tensor:
    """(B, T) int64 -> (B, T) int64: every position counted from the first of its document in the row; no host sync."""
    index = torch.arange(documents.shape[1], device=documents.device)  # (T,)
    begins = documents.diff(dim=1, prepend=documents[:, :1]) != 0  # (B, T); the row's first stays False: it is at 0
    return index - torch.where(begins, index, 0).cummax(dim=1).values


def _kernel_serves(device: torch.device, dtype: torch.dtype, *, dropout: float, head_dim: int) -> bool:
    # A compiler cannot see into it, and would have to cut the model there.
    return dropout == 0 and not torch.compiler.is_compiling() and kernel.serves(device, dtype, head_dim)


def _flex_serves(device: torch.device, *, dropout: float, head_dim: int) -> bool:
    # FlexAttention has no dropout, and no backward pass on a CPU or on MPS.
    return device.type == "cuda" and HAS_TRITON and dropout == 0 and head_dim >= FLEX_MIN_HEAD_DIM


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
