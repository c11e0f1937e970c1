"""Layer norm and RMS norm over the last dimension; large outputs are recomputed in backward."""

from functools import partial

import torch
import torch.nn.functional as F
from torch import nn

from gpt.ops.recompute import recompute_in_backward


class LayerNorm(nn.LayerNorm):
    """Layer norm (Ba et al. 2016); its weights and statistics are float32 under autocast."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Normalise the last dimension; (..., C) -> (..., C)."""
        parameters = (self.weight,) if self.bias is None else (self.weight, self.bias)
        return recompute_in_backward(partial(_layer_norm, eps=self.eps), x, *parameters)


class RMSNorm(nn.RMSNorm):
    """Division by the root mean square (Zhang and Sennrich 2019), in float32 also under autocast, like layer norm."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Normalise the last dimension; (..., C) -> (..., C), float32."""
        return recompute_in_backward(partial(_rms_norm, eps=self.eps), x, self.weight)


def build_norm(kind: str, width: int, *, eps: float, bias: bool) -> nn.Module:
    """Return a norm over `width` channels; `kind` is layernorm or rmsnorm, which has no bias."""
    return RMSNorm(width, eps=eps) if kind == "rmsnorm" else LayerNorm(width, eps=eps, bias=bias)


def _layer_norm(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None, *, eps: float) -> torch.Tensor:
    return F.layer_norm(x, weight.shape, weight, bias, eps)


def _rms_norm(x: torch.Tensor, weight: torch.Tensor, *, eps: float | None) -> torch.Tensor:
    return F.rms_norm(x.float(), weight.shape, weight, eps)
