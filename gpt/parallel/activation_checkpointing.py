"""Activation checkpointing: activations are recomputed in the backward pass instead of being saved.

Chen et al. 2016, "Training Deep Nets with Sublinear Memory Cost". torch restores its generators for the recomputation,
so dropout drops the same elements; losses and gradients keep every bit.
"""

from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts

from gpt.ops.attention_cpu import FORWARD_OP

_aten = torch.ops.aten
SAVED_OPS = [
    *(_aten.mm.default, _aten.addmm.default, _aten.bmm.default),
    _aten._scaled_dot_product_flash_attention_for_cpu.default,
    _aten._scaled_dot_product_flash_attention.default,
    _aten._scaled_dot_product_efficient_attention.default,
    _aten._scaled_dot_product_cudnn_attention.default,
    torch.ops.higher_order.flex_attention,
    FORWARD_OP,
]
"""Ops whose outputs `selective` saves: their cost grows faster than the size of their outputs.

`baddbmm`, which computes attention scores on a CPU, is left out: they are T x T, the largest of all activations, and
cheap to recompute for their size (Korthikanti et al. 2022, "Reducing Activation Recomputation", section 5).
"""


def checkpoint_activations(blocks: Iterable[nn.Module], mode: str) -> None:
    """Make each block save less for backward, in place, so that no name in a state dict changes.

    Args:
        blocks: modules that are called one after the other.
        mode: ParallelConfig's activation_checkpointing; none changes nothing.
    """
    if mode == "none":
        return
    run = partial(checkpoint, use_reentrant=False)
    if mode == "selective":
        run = partial(run, context_fn=partial(create_selective_checkpoint_contexts, SAVED_OPS))
    for block in blocks:
        block.forward = _recompute(run, block.forward)


def _recompute(run: Callable[..., Any], forward: Callable[..., Any]) -> Callable[..., Any]:
    # torch.compile starts at a function's frame, and skips those of torch: a partial of `checkpoint` would not be
    # compiled.
    def checkpointed_forward(*args: Any) -> Any:
        return run(forward, *args)

    return checkpointed_forward
