"""The training loss, fused with the head: all logits never exist at the same time.

Shapes: B sequences, T tokens, N = B * T positions, C channels, V = vocabulary.
"""

import logging
from collections.abc import Iterable
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from gpt.ops.attention import HAS_TRITON
from gpt.ops.precision import autocast_off, compute_dtype
from gpt.utils.helper import IGNORED, first_line

log = logging.getLogger(__name__)

CHUNK_BYTES = 2**27
"""Bytes of logits materialised at a time, whose gradient then overwrites them. The more, the faster are the matmuls,
and the fewer parts of the head's gradient are added up; see `find_chunk_bytes`."""
CUDA_CHUNK_SHARE = 64
"""A GPU's chunk is at most its memory divided by this, a power of two: 1 GiB of 80 GB."""
FLOAT16_GRAD_SCALE = 1024.0
"""Factor of the logits' gradient in float16 on CUDA, where probabilities below 6e-8 would vanish. A power of two; the
matmuls that read it put out float32, which cannot overflow, and divide by it."""
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


def find_chunk_bytes(device: torch.device) -> int:
    """Return the bytes of logits that are materialised at a time on `device`; they depend on its memory alone."""
    if device.type != "cuda":
        return CHUNK_BYTES
    share: int = torch.cuda.get_device_properties(device).total_memory // CUDA_CHUNK_SHARE
    return max(CHUNK_BYTES, 1 << (share.bit_length() - 1))


# A compiler calls it instead of tracing it; see `gpt.ops.attention_cpu.is_enabled`.
find_chunk_bytes._dynamo_marked_constant = True  # type: ignore[attr-defined]


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
        chunk_bytes = find_chunk_bytes(hidden.device)
        rows = max(MIN_CHUNK_ROWS, chunk_bytes // (weight.shape[0] * dtype.itemsize) // 64 * 64)
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
    # The GPU adds up products in float32, so it need not round them before they are added to other chunks'.
    widens = x.device.type == "cuda" and x.dtype in (torch.bfloat16, torch.float16)
    grad_scale = FLOAT16_GRAD_SCALE if widens and x.dtype == torch.float16 else 1.0
    n_vocab = len(weight)
    rows, words = (max(1, _ELEMENTS_PER_TILE // n_vocab), _VOCAB_PER_TILE) if is_tiled else (len(x), n_vocab)
    logits = x @ weight.T
    tiles = zip(logits.split(rows), targets.split(rows), strict=True)
    wants_gradient = weight_grad is not None
    if x.device.type == "cuda" and HAS_TRITON:
        loss = CHUNK_OP(logits, targets, softcap, wants_gradient, grad_scale)
    else:
        losses = [_compute_tile(*tile, softcap, into_gradient=wants_gradient, grad_scale=grad_scale) for tile in tiles]
        loss = torch.stack(losses).sum()
    if weight_grad is None:
        return loss, None
    is_counted = (targets != IGNORED)[:, None].to(x.dtype)
    if widens:
        product = torch.mm(logits.T, x * is_counted, out_dtype=torch.float32).mul_(1 / grad_scale)
        weight_grad.copy_(product) if is_first else weight_grad.add_(product)
        return loss, torch.mm(logits, weight, out_dtype=torch.float32).mul_(is_counted / grad_scale)
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


def _compute_tile(
    logits: torch.Tensor, targets: torch.Tensor, softcap: float, *, into_gradient: bool, grad_scale: float = 1.0
) -> torch.Tensor:
    """Return the summed loss of (rows, V) logits, float32; with `into_gradient` overwrite them with its gradient.

    The gradient is softmax(logits) less one at the target, times `grad_scale`. Rows whose target is IGNORED get one
    too, which the caller masks. Exponentials are taken once: log-sum-exp = largest logit - log(largest probability).
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
        if grad_scale != 1:
            grad.mul_(grad_scale)
        logits.copy_(grad)
    return loss


_TRIAL_VOCAB = 16
"""Logits of the row that tries whether the kernel works."""
_triton_works = True
"""False once a kernel could not be compiled."""


def _compute_cuda_chunk(
    logits: torch.Tensor, targets: torch.Tensor, softcap: float, into_gradient: bool, grad_scale: float
) -> torch.Tensor:
    """Compute what `_compute_tile` does by the Triton kernel, or without it where it cannot be compiled."""
    global _triton_works
    if _triton_works:
        try:
            from gpt.ops.cross_entropy_triton import compute_chunk

            return compute_chunk(logits, targets, softcap, into_gradient=into_gradient, grad_scale=grad_scale)
        except torch.OutOfMemoryError:
            raise
        except Exception as error:  # Triton raises many: no C compiler, an unsupported GPU
            log.warning("the loss's Triton kernel does not work here (%s); going on without it", first_line(error))
            _triton_works = False
    return _compute_tile(logits, targets, softcap, into_gradient=into_gradient, grad_scale=grad_scale)


# An op of torch's own kind, which a compiler calls without looking inside.
_library = torch.library.Library("gpt", "FRAGMENT")
_library.define(
    "cross_entropy_chunk(Tensor(a!) logits, Tensor targets, float softcap, bool into_gradient, float grad_scale) "
    "-> Tensor"
)
_library.impl("cross_entropy_chunk", _compute_cuda_chunk, "CUDA")
torch.library.register_fake(
    "gpt::cross_entropy_chunk", lambda logits, *_: logits.new_empty((), dtype=torch.float32), lib=_library
)
CHUNK_OP = torch.ops.gpt.cross_entropy_chunk.default


def loss_kernel_works(device: torch.device, dtype: torch.dtype, softcap: float) -> bool:
    """Return whether the loss uses the Triton kernel; tries it on one row, and warns where it does not compile."""
    if device.type != "cuda" or not HAS_TRITON:
        return False
    logits = torch.zeros((1, _TRIAL_VOCAB), dtype=dtype, device=device)
    CHUNK_OP(logits, torch.zeros(1, dtype=torch.int64, device=device), softcap, True, 1.0)
    return _triton_works
