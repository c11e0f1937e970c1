"""Functions whose outputs are recomputed in the backward pass instead of being saved.

For norms and activations: they cost next to nothing compared with a matmul, and their outputs are among the largest
tensors that a block would save (Korthikanti et al. 2022, "Reducing Activation Recomputation"). The output of
`recompute_in_backward` has an autograd node of its own kind. `gpt.ops.linear.Linear` recognises that node and keeps it
instead of the tensor. Every other consumer saves the tensor as usual: no result depends on being recognised.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch.autograd.function import once_differentiable

from gpt.ops.precision import capture_autocast

RECOMPUTE_MIN_BYTES = 2**23
"""Bytes of a function's input from which its output is recomputed: this takes 1% of a step of GPT-2 small and saves a
tenth of its memory; at 10 million parameters it would take 5%."""


def recompute_in_backward(
    function: Callable[..., torch.Tensor], x: torch.Tensor, *parameters: torch.Tensor
) -> torch.Tensor:
    """Return `function(x, *parameters)`; where x is large, a `Linear` that reads it does not save it for backward.

    Args:
        function: a deterministic function of its tensors alone.
        x: (..., A).
        parameters: trained tensors that `function` also reads.

    Returns:
        (..., A'), in the dtype that `function` gives it.
    """
    # A compiler decides itself what it saves.
    if torch.compiler.is_compiling() or not torch.is_grad_enabled() or x.nbytes < RECOMPUTE_MIN_BYTES:
        return function(x, *parameters)
    out: torch.Tensor = _Recomputed.apply(function, x, *parameters)  # type: ignore[no-untyped-call]
    if out.grad_fn is not None:
        out.grad_fn.version = out._version  # type: ignore[attr-defined]
    return out


def recomputable_node(x: torch.Tensor) -> Any:
    """Return the autograd node that can recompute x, or None where x must be saved.

    A tensor that was changed in place since is not what its node would recompute.
    """
    node: Any = x.grad_fn
    return node if isinstance(node, _Recomputed._backward_cls) and node.version == x._version else None  # type: ignore[attr-defined]


def recompute(node: Any) -> torch.Tensor:
    """Return the output of a node of `recomputable_node`, in its backward pass.

    The first call runs the function again with gradients enabled and leaves its small graph in the node, whose own
    backward uses it: one recomputation serves all.
    """
    if node.graph is None:
        wanted = node.needs_input_grad[1:]
        tensors = node.saved_tensors  # once only: activation checkpointing unpacks a saved tensor once
        inputs = [tensor.detach().requires_grad_(want) for tensor, want in zip(tensors, wanted, strict=True)]
        with torch.enable_grad(), node.autocast():
            node.graph = inputs, node.function(*inputs)
    out: torch.Tensor = node.graph[1].detach()
    return out


class _Recomputed(torch.autograd.Function):
    """Saves the function's inputs and nothing that is computed from them."""

    @staticmethod
    def forward(ctx: Any, function: Callable[..., torch.Tensor], *tensors: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(*tensors)
        ctx.function, ctx.autocast, ctx.graph = function, capture_autocast(tensors[0].device), None
        return function(*tensors)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> Any:
        recompute(ctx)
        (inputs, out), ctx.graph = ctx.graph, None
        wanted = [tensor for tensor in inputs if tensor.requires_grad]
        grads = iter(torch.autograd.grad(out, wanted, grad))
        return None, *(next(grads) if tensor.requires_grad else None for tensor in inputs)
