"""Cross-entropy of a chunk of logits in one Triton kernel: it reads them, and writes their gradient over them.

The same function as `gpt.ops.cross_entropy._compute_tile`, which takes nine passes over memory uncompiled. As in
Liger-Kernel (Hsu et al. 2024), a program has one row and goes over it twice: for log-sum-exp (Milakov and Gimelshein
2018, "Online normalizer calculation for softmax"), and for the gradient.
"""

import torch
import triton
import triton.language as tl

from gpt.utils.helper import IGNORED

BLOCK = 4096
"""Logits of a row that a program holds at a time."""
WARPS = 8


def compute_chunk(
    logits: torch.Tensor, targets: torch.Tensor, softcap: float, *, into_gradient: bool, grad_scale: float
) -> torch.Tensor:
    """Return the summed loss of (rows, V) logits, float32; with `into_gradient` overwrite them with its gradient.

    Args:
        logits: rows are contiguous.
        targets: (rows,) int64; IGNORED ones have no loss and no gradient.
        softcap: c > 0 bounds the logits to -c ... c.
        into_gradient: whether to write the gradient.
        grad_scale: factor of the gradient.
    """
    assert logits.stride(1) == 1
    losses = torch.empty(len(logits), dtype=torch.float32, device=logits.device)
    _cross_entropy[(len(logits),)](
        logits,
        targets,
        losses,
        logits.stride(0),
        logits.shape[1],
        softcap,
        grad_scale,
        IGNORED=IGNORED,
        HAS_SOFTCAP=softcap > 0,
        WRITES_GRADIENT=into_gradient,
        BLOCK=BLOCK,
        num_warps=WARPS,
    )
    return losses.sum()


@triton.jit
def _cap(x, softcap, HAS_SOFTCAP: tl.constexpr):  # noqa: N803
    if HAS_SOFTCAP:
        x = softcap * (2 * tl.sigmoid(2 * x / softcap) - 1)  # c * tanh(x / c)
    return x


@triton.jit
def _cross_entropy(
    logits,
    targets,
    losses,
    stride,
    n_vocab,
    softcap,
    grad_scale,
    IGNORED: tl.constexpr,  # noqa: N803
    HAS_SOFTCAP: tl.constexpr,  # noqa: N803
    WRITES_GRADIENT: tl.constexpr,  # noqa: N803
    BLOCK: tl.constexpr,  # noqa: N803
):
    row = tl.program_id(0).to(tl.int64)  # rows * stride may exceed 2**31
    logits += row * stride
    target = tl.load(targets + row)
    is_counted = target != IGNORED
    chosen = _cap(tl.load(logits + tl.where(is_counted, target, 0)).to(tl.float32), softcap, HAS_SOFTCAP)

    largest, total = -float("inf"), 0.0  # total = sum of exp(x - largest)
    for start in range(0, n_vocab, BLOCK):
        index = start + tl.arange(0, BLOCK)
        x = _cap(tl.load(logits + index, mask=index < n_vocab, other=0).to(tl.float32), softcap, HAS_SOFTCAP)
        x = tl.where(index < n_vocab, x, -float("inf"))
        new_largest = tl.maximum(largest, tl.max(x, 0))
        total = total * tl.exp(largest - new_largest) + tl.sum(tl.exp(x - new_largest), 0)
        largest = new_largest
    tl.store(losses + row, tl.where(is_counted, largest + tl.log(total) - chosen, 0.0))

    if WRITES_GRADIENT:
        factor = tl.where(is_counted, grad_scale, 0.0)
        for start in range(0, n_vocab, BLOCK):
            index = start + tl.arange(0, BLOCK)
            x = _cap(tl.load(logits + index, mask=index < n_vocab, other=0).to(tl.float32), softcap, HAS_SOFTCAP)
            grad = tl.exp(x - largest) / total - tl.where(index == target, 1.0, 0.0)
            if HAS_SOFTCAP:
                grad *= 1 - (x / softcap) * (x / softcap)
            tl.store(logits + index, (grad * factor).to(logits.dtype.element_ty), mask=index < n_vocab)
