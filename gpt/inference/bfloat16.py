"""Weights in bfloat16, for generation: the arithmetic of training under autocast, with weights that are rounded once.

Matmuls take bfloat16; the residual stream, norms and rotary embeddings stay float32 (`gpt.ops.precision`).
"""

import torch
import torch.nn.functional as F
from torch import nn

from gpt.models.gpt import GPT
from gpt.ops import linear_cpu


class BFloat16Linear(nn.Module):
    """A linear layer whose weight is in bfloat16.

    Args:
        weight: (C, A) bfloat16.
        bias: (C,) float32, or None.
    """

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor | None):
        super().__init__()
        self.weight = nn.Parameter(weight, requires_grad=False)
        self.bias = None if bias is None else nn.Parameter(bias, requires_grad=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Apply the layer; (..., A) -> (..., C) bfloat16."""
        if linear_cpu.supports(x):
            return linear_cpu.forward(x, self.weight, self.bias)
        bias = None if self.bias is None else self.bias.to(torch.bfloat16)
        return F.linear(x.to(torch.bfloat16), self.weight, bias)


class BFloat16Embedding(nn.Module):
    """An embedding whose table is in bfloat16, and its output float32.

    Args:
        weight: (V, C) bfloat16.
    """

    def __init__(self, weight: torch.Tensor):
        super().__init__()
        self.weight = nn.Parameter(weight, requires_grad=False)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        """Look up the tokens; (...) int64 -> (..., C) float32."""
        return F.embedding(tokens, self.weight).float()


@torch.no_grad()
def round_weights_to_bfloat16(model: GPT) -> None:
    """Replace the linear layers, the token embedding and the head of a model by such in bfloat16, in place."""
    linears = {name: module for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    embedding, *weights = _round([model.wte.weight, *(linear.weight for linear in linears.values())])
    for (name, linear), weight in zip(linears.items(), weights, strict=True):
        model.set_submodule(name, BFloat16Linear(weight, linear.bias))
    if model.config.tie_embeddings:
        model.lm_head = BFloat16Linear(embedding, None)  # type: ignore[assignment]
    model.set_submodule("wte", BFloat16Embedding(embedding))


def _round(weights: list[torch.Tensor]) -> list[torch.Tensor]:
    if weights[0].device.type == "cpu":
        return linear_cpu.copy_to_huge_pages(weights, torch.bfloat16)
    return [weight.to(torch.bfloat16) for weight in weights]
