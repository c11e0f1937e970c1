"""The training loss, fused with the head: all logits never exist at the same time.

Shapes: B sequences, T tokens, N = B * T positions, C channels, V = vocabulary.
"""

from collections.abc import Iterable
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from gpt.ops.precision import autocast_off, compute_dtype
from gpt.utils.helper import IGNORED

CHUNK_BYTES = 2**27
"""Bytes of logits materialised at a time, whose gradient then overwrites them. The more, the faster are the matmuls,
and the fewer parts of the head's gradient are added up."""
MIN_CHUNK_ROWS = 256
"""Positions of a chunk below which its matmul would be inefficient."""
_ELEMENTS_PER_TILE = 2**20
"""Logits processed in float32 at a time on a CPU: a tile stays in its cache."""
_VOCAB_PER_TILE = 8192
"""Words of the vocabulary whose part of the head's gradient is computed at a time on a CPU, for the same reason."""


def soft_cap(logits: torch.Tensor, cap: float) -> torch.Tensor:
    """Return logits bounded smoothly to -cap ... cap (Gemma 2, 2024, section 2); a cap of 0 changes nothing."""
    return cap * torch.tanh(logits / cap) if cap else logits


def summed_cross_entropy(logits: torch.Tensor, targets: torch.Tensor, *, softcap: float = 0.0) -> torch.Tensor:
    """Return the sum over targets of the negative log-likelihood in nats, float32, for logits that exist.

    Args:
        logits: (B, T, V), any floating type.
        targets: (B, T) int64; IGNORED ones add nothing.
        softcap: c > 0 bounds the logits, see `soft_cap`.
    """
    capped = soft_cap(logits.float(), softcap).flatten(0, 1)
    return F.cross_entropy(capped, targets.flatten(), ignore_index=IGNORED, reduction="sum")


def fused_linear_cross_entropy(
    hidden: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor, *, softcap: float = 0.0
) -> torch.Tensor:
    """Return `summed_cross_entropy` of the logits `hidden @ weight.T`, without their memory.

    Matmuls take the compute dtype, the rest is float32. It is a sum, not a mean: the caller knows how many tokens the
    step has over all micro-batches and ranks, and divides once.

    Args:
        hidden: (B, T, C), any floating type.
        weight: (V, C), the head's.
        targets: (B, T) int64; IGNORED ones add nothing.
        softcap: c > 0 bounds the logits, see `soft_cap`.
    """
    # Inside forward, a custom function's tensors are detached and do not say whether gradients are wanted.
    wants_gradients = torch.is_grad_enabled() and (hidden.requires_grad or weight.requires_grad)
    rows = hidden.flatten(0, 1)  # (N, C)
    loss: torch.Tensor = _FusedLinearCrossEntropy.apply(  # type: ignore[no-untyped-call]
        rows, weight, targets.flatten(), compute_dtype(hidden), softcap, wants_gradients
    )
    return loss


class LinearCrossEntropy(nn.Module):
    """`fused_linear_cross_entropy` as a module, so that it is compiled by itself; the head's weight is an argument.

    Args:
        softcap: c > 0 bounds the logits, see `soft_cap`.
    """

    def __init__(self, softcap: float):
        super().__init__()
        self.softcap = softcap

    def forward(self, hidden: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        """Return the summed loss; hidden is (B, T, C), weight (V, C), targets (B, T) int64."""
        return fused_linear_cross_entropy(hidden, weight, targets, softcap=self.softcap)


class _FusedLinearCrossEntropy(torch.autograd.Function):
    """Computes the gradients of both inputs in the forward pass, while the logits of a chunk exist.

    Otherwise the logits would be saved for backward (2 V bytes a position, most of a small model's memory) or
    recomputed there (a third more arithmetic). Backward only multiplies by the gradient of the sum.
    """

    @staticmethod
    def forward(
        ctx: Any,
        hidden: torch.Tensor,
        weight: torch.Tensor,
        targets: torch.Tensor,
        dtype: torch.dtype,
        softcap: float,
        wants_gradients: bool,
    ) -> torch.Tensor:
        # oneDNN is faster with full tiles of 64 rows.
        rows = max(MIN_CHUNK_ROWS, CHUNK_BYTES // (weight.shape[0] * dtype.itemsize) // 64 * 64)
        losses: list[torch.Tensor] = []
        hidden_grads: list[torch.Tensor] = []
        weight_grad = torch.empty_like(weight, dtype=torch.float32) if wants_gradients else None  # (V, C)
        with autocast_off(hidden.device):
            rounded = weight.to(dtype)
            for x, target in zip(hidden.to(dtype).split(rows), targets.split(rows), strict=True):
                loss, hidden_grad = _compute_chunk(x, rounded, target, softcap, weight_grad, is_first=not losses)
                losses.append(loss)
                if hidden_grad is not None:
                    hidden_grads.append(hidden_grad)
        if weight_grad is not None:
            ctx.save_for_backward(torch.cat(hidden_grads).to(hidden.dtype), weight_grad.to(weight.dtype))
        return torch.stack(losses).sum()

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> Any:
        # In place: memory peaks here, and nothing else refers to these tensors.
        hidden_grad, weight_grad = (saved.mul_(grad.to(saved.dtype)) for saved in ctx.saved_tensors)
        return hidden_grad, weight_grad, None, None, None, None


def _compute_chunk(
    x: torch.Tensor,
    weight: torch.Tensor,
    targets: torch.Tensor,
    softcap: float,
    weight_grad: torch.Tensor | None,
    *,
    is_first: bool,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Return the summed loss of some positions and its gradient by x; add the gradient by the weight to `weight_grad`.

    It is a function so that its logits are freed before those of the next chunk are allocated.
    """
    # A GPU has the bandwidth, and a compiler fuses the operations.
    is_tiled = x.device.type == "cpu" and not torch.compiler.is_compiling()
    n_vocab = len(weight)
    rows, words = (max(1, _ELEMENTS_PER_TILE // n_vocab), _VOCAB_PER_TILE) if is_tiled else (len(x), n_vocab)
    logits = x @ weight.T
    tiles = zip(logits.split(rows), targets.split(rows), strict=True)
    losses = [_compute_tile(tile, target, softcap, into_gradient=weight_grad is not None) for tile, target in tiles]
    loss = torch.stack(losses).sum()
    if weight_grad is None:
        return loss, None
    is_counted = (targets != IGNORED)[:, None].to(x.dtype)
    _accumulate_weight_grad(weight_grad.split(words), logits.split(words, dim=1), x * is_counted, is_first=is_first)
    return loss, (logits @ weight).mul_(is_counted)


def _accumulate_weight_grad(
    totals: Iterable[torch.Tensor], logit_grads: Iterable[torch.Tensor], x: torch.Tensor, *, is_first: bool
) -> None:
    """Add a chunk's gradient to the weight's, float32; the first chunk overwrites it.

    Both come in tiles of the vocabulary, so that a product is still in the cache when it is converted and added.
    """
    for total, logit_grad in zip(totals, logit_grads, strict=True):
        product = logit_grad.T @ x
        if is_first:
            total.copy_(product)
        else:
            total += product


def _compute_tile(logits: torch.Tensor, targets: torch.Tensor, softcap: float, *, into_gradient: bool) -> torch.Tensor:
    """Return the summed loss of (rows, V) logits, float32; with `into_gradient` overwrite them with its gradient.

    The gradient is softmax(logits) less one at the target. Rows whose target is IGNORED get one too, which the caller
    masks. Exponentials are taken once: log-sum-exp = largest logit - log(largest probability).
    """
    capped = soft_cap(logits.float(), softcap) if softcap else logits
    probabilities = torch.softmax(capped, dim=1, dtype=torch.float32)
    index = targets.clamp_min(0)[:, None]  # (rows, 1)
    largest, chosen = capped.amax(1, keepdim=True).float(), capped.gather(1, index).float()
    nats = largest - probabilities.amax(1, keepdim=True).log() - chosen
    loss = torch.where(targets[:, None] == IGNORED, 0, nats).sum()
    if into_gradient:
        grad = probabilities.scatter_add_(1, index, index.new_full(index.shape, -1, dtype=torch.float32))
        if softcap:  # the derivative of c * tanh(x / c)
            grad.mul_(1 - (capped / softcap).square_())
        logits.copy_(grad)
    return loss
