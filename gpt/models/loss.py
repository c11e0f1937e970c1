"""The training loss: an output layer whose logits never exist all at once.

Shapes: N positions of all sequences together, C = width, V = vocabulary.
"""

from typing import Any

import torch
import torch.nn.functional as F

from gpt.models.layers import soft_cap
from gpt.utils.helper import IGNORED

CHUNK_LOGITS = 2**24
"""Logits that are made at once: 64 MiB as float32, and as much again while their gradient is made."""
LEAST_ROWS = 256
"""Rows below which the matrix product of a chunk would be inefficient."""


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
    device = hidden.device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else hidden.dtype
    # apply() hands a custom function detached tensors, and says nowhere whether anyone will ask for the gradients.
    wants_gradients = torch.is_grad_enabled() and (hidden.requires_grad or head.requires_grad)
    rows = hidden.flatten(0, 1)  # (N, C)
    loss: torch.Tensor = _HeadLoss.apply(  # type: ignore[no-untyped-call]
        rows, head, targets.flatten(), dtype, softcap, wants_gradients
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
        rows = max(LEAST_ROWS, CHUNK_LOGITS // head.shape[0] // 64 * 64)  # oneDNN is faster with whole tiles
        with torch.autocast(hidden.device.type, enabled=False):
            weight = head.to(dtype)
            chunks = zip(hidden.to(dtype).split(rows), targets.split(rows), strict=True)
            if not wants_gradients:
                return torch.stack([_nats(_log_probabilities(x @ weight.T, softcap), t).sum() for x, t in chunks]).sum()
            losses, hidden_grads = [], []
            head_grad = torch.zeros_like(head, dtype=torch.float32)  # (V, C)
            for x, target in chunks:
                loss, logit_grad = _loss_and_gradient(x @ weight.T, target, softcap)
                losses.append(loss)
                hidden_grads.append(logit_grad @ weight)
                head_grad += logit_grad.T @ x
                del logit_grad  # or it would lie there beside the next chunk's logits
        ctx.save_for_backward(torch.cat(hidden_grads).to(hidden.dtype), head_grad.to(head.dtype))
        return torch.stack(losses).sum()

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> Any:
        # In place: this is when a step holds the most, and nobody else has these.
        hidden_grad, head_grad = (saved.mul_(grad.to(saved.dtype)) for saved in ctx.saved_tensors)
        return hidden_grad, head_grad, None, None, None, None


def _log_probabilities(logits: torch.Tensor, softcap: float) -> torch.Tensor:
    """(rows, V) logits -> float32."""
    if softcap:
        logits = soft_cap(logits.float(), softcap)
    return F.log_softmax(logits, dim=1, dtype=torch.float32)


def _nats(logp: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """(rows,) float32; 0 for IGNORED targets."""
    return F.nll_loss(logp, targets, ignore_index=IGNORED, reduction="none")


def _loss_and_gradient(
    logits: torch.Tensor, targets: torch.Tensor, softcap: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Summed loss, and its gradient with regard to (rows, V) logits, in their type.

    The gradient is probabilities less one at the target, and 0 in rows whose target is IGNORED.
    """
    logp = _log_probabilities(logits, softcap)  # float32
    loss = _nats(logp, targets).sum()
    counted = (targets != IGNORED).float()[:, None]
    grad = logp.exp_().mul_(counted)
    grad.scatter_add_(1, targets.clamp_min(0)[:, None], -counted)
    if softcap:  # the derivative of c * tanh(x / c)
        grad.mul_(1 - torch.tanh(logits.float() / softcap).square_())
    return loss, grad.to(logits.dtype)
