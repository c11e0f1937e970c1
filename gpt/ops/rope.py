"""Rotary position embeddings (Su et al. 2021, "RoFormer").

Shapes: B sequences, H heads, T tokens, D = head_dim.
"""

import math
from typing import NamedTuple

import torch

Rope = tuple[torch.Tensor, torch.Tensor]
"""Cosines and sines of each position: (T, D), or (B, 1, T, D) where sequences differ in their positions."""


class RopeScaling(NamedTuple):
    """Scaling of the wavelengths to a longer context, as in Llama 3.1 (transformers' modeling_rope_utils.py)."""

    factor: float
    """Growth of the long wavelengths."""
    low_freq_factor: float
    """Wavelengths above original_block_size / low_freq_factor grow by the whole factor."""
    high_freq_factor: float
    """Wavelengths below original_block_size / high_freq_factor stay as they are."""
    original_block_size: int
    """Context in tokens that the model was first trained with."""


def rope_cos_sin(positions: torch.Tensor, head_dim: int, theta: float, scaling: RopeScaling | None = None) -> Rope:
    """Return the cosines and sines of each position's angles, float32; computed once per forward pass, for all layers.

    angle(position, i) = position * theta ** (-2 i / D), for i < D / 2 (RoFormer, section 3.2.2).

    Args:
        positions: (T,) or (B, T) int64.
        head_dim: D, even.
        theta: base of the wavelengths; the slowest pair of channels has a period of about 2 pi theta positions.
        scaling: change of the wavelengths; None: none.
    """
    pairs = torch.arange(0, head_dim, 2, device=positions.device, dtype=torch.float32)  # (D/2,)
    frequencies = theta ** (-pairs / head_dim)  # (D/2,)
    if scaling is not None:
        frequencies = scale_frequencies(frequencies, scaling)
    angles = positions[..., None] * frequencies  # (T, D/2) or (B, T, D/2), float32
    angles = torch.cat([angles, angles], dim=-1)
    if angles.dim() == 3:
        angles = angles[:, None]  # (B, 1, T, D): the same for every head
    return angles.cos(), angles.sin()


def scale_frequencies(frequencies: torch.Tensor, scaling: RopeScaling) -> torch.Tensor:
    """Divide low frequencies by the factor, keep high ones, and interpolate between them by the turns in the context.

    Args:
        frequencies: (D/2,) radians per position.
        scaling: factor and the bounds of the interpolation.
    """
    turns = scaling.original_block_size * frequencies / (2 * math.pi)  # (D/2,), within the original context
    low, high = scaling.low_freq_factor, scaling.high_freq_factor
    unscaled_share = ((turns - low) / (high - low)).clamp(0, 1)
    return frequencies * (unscaled_share + (1 - unscaled_share) / scaling.factor)


def apply_rope(x: torch.Tensor, rope: Rope) -> torch.Tensor:
    """Return x with its channels rotated by position (RoFormer, equation 34): scores depend on distances alone.

    Channel i is paired with channel i + D/2, as in GPT-NeoX and in transformers' Llama. Computed in float32: bfloat16
    would round the angles of far positions away.

    Args:
        x: (B, H, T, D), queries or keys.
        rope: cosines and sines of the positions of x.
    """
    cos, sin = rope
    left, right = x.chunk(2, dim=-1)
    return (x * cos + torch.cat([-right, left], dim=-1) * sin).type_as(x)
