"""Layer norm and RMS norm over the last dimension; large outputs are recomputed in backward.

Both compute in float32 under autocast. A norm that only linear layers read may round its output to their compute
dtype: the bits are the same, and no float32 copy is alive while the layer allocates its output.
"""

from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import nn

from gpt.ops.precision import compute_dtype
from gpt.ops.recompute import recompute_in_backward


class LayerNorm(nn.LayerNorm):
    """Layer norm (Ba et al. 2016).

    Args:
        width: number of channels.
        eps: added to the variance.
        bias: whether it has a bias.
        rounds: whether the output has the compute dtype instead of float32.
    """

    def __init__(self, width: int, *, eps: float, bias: bool, rounds: bool = False):
        super().__init__(width, eps=eps, bias=bias)
        self._function = _round_output(_layer_norm) if rounds else _layer_norm

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Normalise the last dimension; (..., C) -> (..., C)."""
        parameters = (self.weight,) if self.bias is None else (self.weight, self.bias)
        return recompute_in_backward(partial(self._function, eps=self.eps), x, *parameters)


class RMSNorm(nn.RMSNorm):
    """Division by the root mean square (Zhang and Sennrich 2019), in float32 also under autocast, like layer norm.

    Args:
        width: number of channels.
        eps: added to the mean square.
        rounds: whether the output has the compute dtype instead of float32.
    """

    def __init__(self, width: int, *, eps: float, rounds: bool = False):
        super().__init__(width, eps=eps)
        self._function = _round_output(_rms_norm) if rounds else _rms_norm

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Normalise the last dimension; (..., C) -> (..., C)."""
        return recompute_in_backward(partial(self._function, eps=self.eps), x, self.weight)


def build_norm(kind: str, width: int, *, eps: float, bias: bool, rounds: bool = False) -> nn.Module:
    """Return a norm over `width` channels; `kind` is layernorm or rmsnorm, which has no bias."""
    if kind == "rmsnorm":
        return RMSNorm(width, eps=eps, rounds=rounds)
    return LayerNorm(width, eps=eps, bias=bias, rounds=rounds)


def _layer_norm(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None, *, eps: float) -> torch.Tensor:
    return F.layer_norm(x, weight.shape, weight, bias, eps)


def _rms_norm(x: torch.Tensor, weight: torch.Tensor, *, eps: float | None) -> torch.Tensor:
    return F.rms_norm(x.float(), weight.shape, weight, eps)


def _round_output(function: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    def round_output(x: torch.Tensor, *parameters: torch.Tensor, eps: float | None) -> torch.Tensor:
        return function(x, *parameters, eps=eps).to(compute_dtype(x))

    return round_output
