"""What the layers of a GPT are made of: norms, activations, rotary positions, the cap on logits.

Shapes: B rows, H heads, T tokens, C channels, D = width of a head.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from gpt.configs.gpt_config import GPTConfig
from gpt.ops.gelu import gelu

RMS_EPSILON = 1e-6
"""As in Llama and Qwen 3."""
ROTARY_BASE = 10_000.0
"""RoFormer, Su et al. 2021, section 3.2.2: the slowest pair of channels turns once in 2 * pi * 10,000 positions."""
RECOMPUTE_MIN_BYTES = 2**23
"""Bytes of its input from which `linear_of` makes a function's result again: that takes 1% of a step of GPT-2 small and
saves a tenth of its memory; of a model of 10 million parameters it would take 5%."""

Rotation = tuple[torch.Tensor, torch.Tensor]
"""Cosines and sines for each position: (T, D), or (B, 1, T, D) where rows differ."""


class FusedLinear(nn.Linear):
    """Several linear layers with one input, in one product: the rows of their weights lie one below the other.

    Args:
        n_in: channels of the input.
        parts: channels that each layer makes.
        bias: whether they have biases.
    """

    def __init__(self, n_in: int, parts: tuple[int, ...], *, bias: bool):
        super().__init__(n_in, sum(parts), bias=bias)
        self.parts = parts


class RMSNorm(nn.RMSNorm):
    """Division by the root mean square (Zhang and Sennrich 2019), in float32 also under autocast, as layer norm is."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(..., C) -> (..., C), float32."""
        return super().forward(x.float())


def make_norm(config: GPTConfig, width: int) -> nn.Module:
    """The norm of `config` over the last dimension, `width` wide."""
    if config.norm == "rmsnorm":
        return RMSNorm(width, eps=RMS_EPSILON)
    return nn.LayerNorm(width, bias=config.bias)


def relu2(x: torch.Tensor) -> torch.Tensor:
    """Squared ReLU (So et al. 2021, "Primer", section 4)."""
    return F.relu(x).square()


def swiglu(x: torch.Tensor) -> torch.Tensor:
    """(..., 2F) -> (..., F): the first half, through SiLU, gates the second (Shazeer 2020, equation 6)."""
    gate, value = x.chunk(2, dim=-1)
    return F.silu(gate) * value


ACTIVATIONS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "gelu": gelu,
    "gelu_erf": F.gelu,  # x times the normal distribution (Hendrycks and Gimpel 2016, section 2)
    "relu2": relu2,
    "swiglu": swiglu,
}


def linear_of(function: Callable[[torch.Tensor], torch.Tensor], x: torch.Tensor, layer: nn.Linear) -> torch.Tensor:
    """`layer(function(x))`; where x is large, it alone is kept for the backward pass, which makes function(x) again.

    For functions that cost next to nothing beside a product of matrices, norms and activations: what they return is
    among the largest things that a block would keep (Korthikanti et al. 2022, "Reducing Activation Recomputation").

    Args:
        function: a norm with its parameters, or an activation.
        x: (..., A).
        layer: from what the function returns to C channels.

    Returns:
        (..., C).
    """
    # A compiler chooses itself what it keeps.
    if torch.compiler.is_compiling() or x.nbytes < RECOMPUTE_MIN_BYTES:
        kept: torch.Tensor = layer(function(x))
        return kept
    parameters = tuple(function.parameters()) if isinstance(function, nn.Module) else ()
    out: torch.Tensor = _LinearOf.apply(  # type: ignore[no-untyped-call]
        function, compute_dtype(x), x, layer.weight, layer.bias, *parameters
    )
    return out


class _LinearOf(torch.autograd.Function):
    """Of the weight, too, nothing is kept but itself: to round it again takes less than it would weigh."""

    @staticmethod
    def forward(
        ctx: Any,
        function: Callable[[torch.Tensor], torch.Tensor],
        dtype: torch.dtype,
        x: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        *parameters: torch.Tensor,
    ) -> torch.Tensor:
        ctx.save_for_backward(x, weight, *parameters)
        ctx.function, ctx.dtype, ctx.has_bias = function, dtype, bias is not None
        return F.linear(function(x).to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype))

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> Any:
        x, weight, *parameters = ctx.saved_tensors
        rows = grad.flatten(0, -2)  # (N, C)
        with torch.enable_grad():
            x = x.detach().requires_grad_()
            y = ctx.function(x).to(ctx.dtype)
        weight_grad = (rows.T @ y.detach().flatten(0, -2)).to(weight.dtype)
        bias_grad = rows.sum(0).to(weight.dtype) if ctx.has_bias else None
        input_grads = torch.autograd.grad(y, (x, *parameters), grad @ weight.to(ctx.dtype))
        return None, None, input_grads[0], weight_grad, bias_grad, *input_grads[1:]


def as_autocast_would(*tensors: torch.Tensor) -> list[torch.Tensor]:
    """In the type that autocast would have; functions of our own are not on its list."""
    return [tensor.to(compute_dtype(tensor)) for tensor in tensors]


def compute_dtype(tensor: torch.Tensor) -> torch.dtype:
    """The type that autocast would have products of this tensor in; its own where there is no autocast."""
    device = tensor.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else tensor.dtype


def rotation(positions: torch.Tensor, head_dim: int) -> Rotation:
    """How far each position turns each pair of channels; made once in a forward pass, for all its layers.

    Args:
        positions: (T,) or (B, T) int64.
        head_dim: D, even.
    """
    pairs = torch.arange(0, head_dim, 2, device=positions.device, dtype=torch.float32)  # (D/2,)
    angles = positions[..., None] * ROTARY_BASE ** (-pairs / head_dim)  # (T, D/2) or (B, T, D/2), float32
    angles = torch.cat([angles, angles], dim=-1)
    if angles.dim() == 3:
        angles = angles[:, None]  # (B, 1, T, D): the same for every head
    return angles.cos(), angles.sin()


def rotate(x: torch.Tensor, by: Rotation) -> torch.Tensor:
    """Rotary positions (RoFormer, equation 34), so that a score depends on the distance of query and key alone.

    Channel i is paired with channel i + D/2, as in GPT-NeoX and in transformers' Llama. Computed in float32: bfloat16
    would round the angles of far positions away.

    Args:
        x: (B, H, T, D), queries or keys.
        by: of the positions of x.
    """
    cos, sin = by
    left, right = x.chunk(2, dim=-1)
    return (x * cos + torch.cat([-right, left], dim=-1) * sin).type_as(x)


def soft_cap(logits: torch.Tensor, cap: float) -> torch.Tensor:
    """Bounded to -cap ... cap, smoothly (Gemma 2, 2024, section 2); 0 leaves them as they are."""
    return cap * torch.tanh(logits / cap) if cap else logits
