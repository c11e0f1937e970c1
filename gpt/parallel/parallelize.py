"""Activation checkpointing, compile, DDP: the fixed order in which a model is made ready to train."""

import logging
from collections.abc import Callable, Iterable

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from gpt.configs.parallel_config import ParallelConfig
from gpt.parallel.activation_checkpointing import checkpoint_activations
from gpt.parallel.gradient_sync import AveragedGradients, GradientSync
from gpt.parallel.reproducible import TreeGradients
from gpt.utils.distributed import DistContext
from gpt.utils.helper import first_line

log = logging.getLogger(__name__)

COMPILE_MODES = {"default": None, "max-autotune": "max-autotune-no-cudagraphs"}
"""torch's names. CUDA graphs would overwrite the loss of a micro-batch with the next one's."""


def parallelize(
    model: nn.Module,
    blocks: Iterable[nn.Module],
    dist: DistContext,
    config: ParallelConfig,
    *,
    compile_mode: str | None,
    trial: Callable[[nn.Module], torch.Tensor],
) -> nn.Module:
    """The module that the training step calls: compiled in place where asked, wrapped in DDP for several processes.

    `blocks` are the parts of the model that keep less for the backward pass where `config` asks for it; the compiler
    must find them so. DDP averages gradients over processes, but for the reproducible mode, in which the module
    stays bare. `compile_mode` is one of COMPILE_MODES, or None; compiling in place changes no name in a state dict.
    `trial` maps the module to a loss: it is run once, forward and backward, so that what the compiler cannot do shows
    before the first step; the model then runs as it is. It runs inside the wrapper, for the compiler cuts the graph to
    DDP's buckets.
    """
    checkpoint_activations(blocks, config.activation_checkpointing)
    if compile_mode is not None:
        model.compile(mode=COMPILE_MODES[compile_mode])
    ready = model
    if dist.world_size > 1 and not config.reproducible:
        ready = DistributedDataParallel(
            model,
            device_ids=[dist.device] if dist.device.type == "cuda" else None,
            process_group=dist.step_group,
            gradient_as_bucket_view=True,
        )
    if compile_mode is not None:
        try:
            with AveragedGradients(ready, dist.world_size).micro_batch(is_last=False):
                trial(ready).backward()
        except Exception as error:  # any of the compiler's many: no C++ compiler, no Triton, an unsupported Python
            model._compiled_call_impl = None
            torch._dynamo.reset()
            log.warning("torch.compile does not work here (%s); going on without it", first_line(error))
        model.zero_grad(set_to_none=True)
    return ready


def build_gradient_sync(ready: nn.Module, dist: DistContext, config: ParallelConfig) -> GradientSync:
    """How the gradients of what `parallelize` returned are added up."""
    if config.reproducible:
        return TreeGradients(ready.parameters(), dist)
    return AveragedGradients(ready, dist.world_size)
