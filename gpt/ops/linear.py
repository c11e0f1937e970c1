"""Linear layers that save little for the backward pass, and are called like any other module.

Shapes: A input channels, C output channels, N = all rows of a batch.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.autograd.function import once_differentiable

from gpt.ops import recompute as recomputation
from gpt.ops.precision import compute_dtype
from gpt.ops.recompute import recomputable_node, recompute


class Linear(nn.Linear):
    """`nn.Linear` that saves less for backward where its input is large.

    Under autocast it saves the weight as it is and rounds it again in backward; the rounded copies of GPT-2 small are
    160 MB. Where its input comes from `recompute_in_backward`, it saves no input either. It reads `self.weight` like
    its base class, so hooks, wrappers and parametrizations act on it as on any other layer.
    """

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Apply the layer; (..., A) -> (..., C), in the compute dtype."""
        # A compiler decides itself what to save. For small inputs, rounding the weight twice costs more than it saves.
        if torch.compiler.is_compiling() or not torch.is_grad_enabled():
            return F.linear(x, self.weight, self.bias)
        node = recomputable_node(x)
        if node is None and x.nbytes < recomputation.RECOMPUTE_MIN_BYTES:
            return F.linear(x, self.weight, self.bias)
        out: torch.Tensor = _LeanLinear.apply(node, compute_dtype(x), x, self.weight, self.bias)  # type: ignore[no-untyped-call]
        return out


class FusedLinear(Linear):
    """Several linear layers with one input as one matmul: the rows of their weights are concatenated.

    Args:
        n_in: A.
        sizes: output channels of each layer; an optimizer of matrices treats each by itself.
        bias: whether they have biases.
    """

    def __init__(self, n_in: int, sizes: tuple[int, ...], *, bias: bool):
        super().__init__(n_in, sum(sizes), bias=bias)
        self.sizes = sizes


def is_plain_linear(module: nn.Module) -> bool:
    """Return whether calling `module` computes `x @ module.weight.T` and nothing else.

    Only then may an op fuse its matmul with what follows. Hooks, parametrizations and subclasses of others (LoRA, FP8)
    rule that out, and so does a forward that was replaced.
    """
    return (
        type(module) in (Linear, nn.Linear)
        and getattr(module, "bias", None) is None
        and "forward" not in vars(module)
        and not (module._forward_hooks or module._forward_pre_hooks)
        and not (module._backward_hooks or module._backward_pre_hooks)
        and not torch.nn.modules.module._has_any_global_hook()
    )


class _LeanLinear(torch.autograd.Function):
    """The same arithmetic as `F.linear` under autocast, in the same order: every bit is the same."""

    @staticmethod
    def forward(
        ctx: Any,
        node: Any,
        dtype: torch.dtype,
        x: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
    ) -> torch.Tensor:
        _, _, wants_x, wants_weight, _ = ctx.needs_input_grad
        rounded = x.to(dtype)
        saves_x = wants_weight and node is None
        ctx.save_for_backward(rounded if saves_x else None, weight if wants_x else None)
        ctx.node, ctx.dtype = node, dtype
        return F.linear(rounded, weight.to(dtype), None if bias is None else bias.to(dtype))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> Any:
        x, weight = ctx.saved_tensors
        _, _, wants_x, wants_weight, wants_bias = ctx.needs_input_grad
        rows = grad.reshape(-1, grad.shape[-1])  # (N, C)
        weight_grad = bias_grad = x_grad = None
        if wants_weight:
            x = recompute(ctx.node).to(ctx.dtype) if x is None else x
            weight_grad = rows.T @ x.reshape(-1, x.shape[-1])  # (C, A)
        if wants_bias:
            bias_grad = rows.sum(0)
        if wants_x:
            x_grad = grad @ weight.to(ctx.dtype)  # (..., A)
        return None, None, x_grad, weight_grad, bias_grad  # autograd converts each to its input's dtype
