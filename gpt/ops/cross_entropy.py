"""The training loss: an output layer whose logits never exist all at once.

Shapes: N positions of all sequences together, C = width, V = vocabulary.
"""

from collections.abc import Iterable
from typing import Any

import torch

from gpt.ops.layers import compute_dtype, soft_cap
from gpt.utils.helper import IGNORED

CHUNK_BYTES = 2**27
"""Of logits that are made at once, and then turned into their gradients where they lie. The more, the faster are the
products, and the fewer parts of the head's gradient are added up."""
MIN_CHUNK_ROWS = 256
"""Rows below which the matrix product of a chunk would be inefficient."""
PIECE = 2**20
"""On a CPU, how many of them are worked on in float32 at once: they stay in its cache."""
WORDS = 8192
"""On a CPU, words of the vocabulary whose part of the head's gradient is made at once, for the same reason."""


def head_loss(hidden: torch.Tensor, head: torch.Tensor, targets: torch.Tensor, *, softcap: float = 0.0) -> torch.Tensor:
    """Sum over targets of the negative log-likelihood in nats; matrix products in autocast's type, the rest in float32.

    A sum, not a mean: whoever knows how many tokens the whole step has, over all micro-batches and processes,
    divides by that number once.

    Args:
        hidden: (B, T, C), any floating type.
        head: (V, C), the output embedding.
        targets: (B, T) int64; IGNORED ones add nothing.
        softcap: c > 0 bounds the logits, see `soft_cap`.
    """
    # apply() hands a custom function detached tensors, and says nowhere whether anyone will ask for the gradients.
    wants_gradients = torch.is_grad_enabled() and (hidden.requires_grad or head.requires_grad)
    rows = hidden.flatten(0, 1)  # (N, C)
    loss: torch.Tensor = _HeadLoss.apply(  # type: ignore[no-untyped-call]
        rows, head, targets.flatten(), compute_dtype(hidden), softcap, wants_gradients
    )
    return loss


class _HeadLoss(torch.autograd.Function):
    """The loss, and while the logits of a chunk exist also the gradients of both inputs.

    Backward, the logits would have to be kept (2 V bytes a position, which is most of a small model's memory) or made
    again (a third more arithmetic). What backward adds is one factor: the gradient of the sum.
    """

    @staticmethod
    def forward(
        ctx: Any,
        hidden: torch.Tensor,
        head: torch.Tensor,
        targets: torch.Tensor,
        dtype: torch.dtype,
        softcap: float,
        wants_gradients: bool,
    ) -> torch.Tensor:
        # oneDNN is faster with whole tiles.
        rows = max(MIN_CHUNK_ROWS, CHUNK_BYTES // (head.shape[0] * dtype.itemsize) // 64 * 64)
        losses: list[torch.Tensor] = []
        hidden_grads: list[torch.Tensor] = []
        head_grad = torch.empty_like(head, dtype=torch.float32) if wants_gradients else None  # (V, C)
        with torch.autocast(hidden.device.type, enabled=False):
            weight = head.to(dtype)
            for x, target in zip(hidden.to(dtype).split(rows), targets.split(rows), strict=True):
                loss, hidden_grad = _of_chunk(x, weight, target, softcap, head_grad, is_first=not losses)
                losses.append(loss)
                if hidden_grad is not None:
                    hidden_grads.append(hidden_grad)
        if head_grad is not None:
            ctx.save_for_backward(torch.cat(hidden_grads).to(hidden.dtype), head_grad.to(head.dtype))
        return torch.stack(losses).sum()

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> Any:
        # In place: this is when a step holds the most, and nobody else has these.
        hidden_grad, head_grad = (saved.mul_(grad.to(saved.dtype)) for saved in ctx.saved_tensors)
        return hidden_grad, head_grad, None, None, None, None


def _of_chunk(
    x: torch.Tensor,
    weight: torch.Tensor,
    targets: torch.Tensor,
    softcap: float,
    head_grad: torch.Tensor | None,
    *,
    is_first: bool,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Summed loss of some rows and its gradient with regard to them; what the head's is, is added to `head_grad`.

    A function of its own, so that nothing is left of its logits when the next chunk's are made.
    """
    # A GPU has the bandwidth, and a compiler fuses the operations.
    in_pieces = x.device.type == "cpu" and not torch.compiler.is_compiling()
    n_vocab = len(weight)
    rows_of_piece, words = (max(1, PIECE // n_vocab), WORDS) if in_pieces else (len(x), n_vocab)
    logits = x @ weight.T
    pieces = zip(logits.split(rows_of_piece), targets.split(rows_of_piece), strict=True)
    loss = torch.stack([_loss(piece, its, softcap, into_gradient=head_grad is not None) for piece, its in pieces]).sum()
    if head_grad is None:
        return loss, None
    counted = (targets != IGNORED)[:, None].to(x.dtype)
    _add_products(head_grad.split(words), logits.split(words, dim=1), x * counted, is_first=is_first)
    return loss, (logits @ weight).mul_(counted)


def _add_products(
    totals: Iterable[torch.Tensor], logit_grads: Iterable[torch.Tensor], x: torch.Tensor, *, is_first: bool
) -> None:
    """Add to the gradient of the head, float32, that of a chunk's rows; the first is put in its place.

    Both come as parts of the vocabulary, so that a product is still in the cache when it is converted and added.
    """
    for total, logit_grad in zip(totals, logit_grads, strict=True):
        product = logit_grad.T @ x
        if is_first:
            total.copy_(product)
        else:
            total += product


def _loss(logits: torch.Tensor, targets: torch.Tensor, softcap: float, *, into_gradient: bool) -> torch.Tensor:
    """Summed loss of (rows, V) logits, float32; with `into_gradient` they become its gradient with regard to them.

    The gradient is probabilities less one at the target; rows whose target is IGNORED have one, too, and are not to be
    counted. Exponentials are taken once, for the largest probability, being that of the largest logit, tells their sum.
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
