"""Activations that are made again in the backward pass instead of being kept.

Chen et al. 2016, "Training Deep Nets with Sublinear Memory Cost". Dropout draws the
same again, for torch restores the state of its generators; losses and gradients keep every bit.
"""

from collections.abc import Iterable
from functools import partial

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts

_aten = torch.ops.aten
KEPT = [
    *(_aten.mm.default, _aten.addmm.default, _aten.bmm.default),
    _aten._scaled_dot_product_flash_attention_for_cpu.default,
    _aten._scaled_dot_product_flash_attention.default,
    _aten._scaled_dot_product_efficient_attention.default,
    _aten._scaled_dot_product_cudnn_attention.default,
]
"""What `selective` keeps: the operations whose cost grows with a width or a length beside that of their result.

`baddbmm`, which makes the scores of attention on a CPU, is left out: they are T x T, the largest of all activations,
and cheap to make for their size (Korthikanti et al. 2022, "Reducing Activation Recomputation", section 5).
"""


def checkpoint_activations(blocks: Iterable[nn.Module], mode: str) -> None:
    """Let each block keep less for the backward pass; in place, so that no name in a state dict changes.

    Args:
        blocks: called one after the other, each with tensors or what holds them.
        mode: of ParallelConfig; none leaves them as they are.
    """
    if mode == "none":
        return
    run = partial(checkpoint, use_reentrant=False)
    if mode == "selective":
        run = partial(run, context_fn=partial(create_selective_checkpoint_contexts, KEPT))
    for block in blocks:
        block.forward = partial(run, block.forward)
