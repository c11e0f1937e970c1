"""Activation checkpointing, compile, DDP: the fixed order in which a model is parallelized and compiled."""

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
    others: Iterable[nn.Module] = (),
) -> nn.Module:
    """Return the module that the training step calls: `model` itself, or DDP around it on several ranks.

    DDP averages gradients over ranks, except in the reproducible mode, which adds them itself. Everything else happens
    in place, so that no name in a state dict changes. Each block is compiled by itself: equal blocks share their
    compiled code, so more layers take no longer to compile, and DDP's hooks run between blocks.

    Args:
        model: the bare model.
        blocks: its submodules to which activation checkpointing applies, before they are compiled.
        dist: the ranks.
        config: activation checkpointing, and whether the run is reproducible.
        compile_mode: one of COMPILE_MODES; None does not compile. Compilation happens at the first call; see
            `compile_or_fall_back`.
        others: submodules that are compiled, too.
    """
    blocks = list(blocks)
    checkpoint_activations(blocks, config.activation_checkpointing)
    if compile_mode is not None:
        torch._dynamo.config.optimize_ddp = False  # it would cut each block's graph at DDP's buckets
        for module in (*blocks, *others):
            module.compile(mode=COMPILE_MODES[compile_mode], fullgraph=True)
    if dist.world_size == 1 or config.reproducible:
        return model
    return DistributedDataParallel(
        model,
        device_ids=[dist.device] if dist.device.type == "cuda" else None,
        process_group=dist.step_group,
        gradient_as_bucket_view=True,
    )


def compile_or_fall_back(
    model: nn.Module, parallelized: nn.Module, trial: Callable[[nn.Module], torch.Tensor], dist: DistContext
) -> str:
    """Compile what `parallelize` marked, by trials of training and of evaluation; no later step compiles anything.

    Where it fails on one rank, warn and let the model run uncompiled on all.

    Args:
        model: the bare model, which is evaluated.
        parallelized: what `parallelize` returned for it, which is trained.
        trial: maps a module to a loss.
        dist: the ranks.

    Returns:
        The reason why the model runs uncompiled; empty if it is compiled.

    Raises:
        torch.OutOfMemoryError: the trial does not fit in memory, compiled or not.
    """
    failure = _find_compile_failure(model, parallelized, trial)
    first = dist.min(dist.rank if failure else dist.world_size)
    if first == dist.world_size:
        return ""
    failure = str(dist.broadcast(failure, first))
    for module in model.modules():
        module._compiled_call_impl = None
    torch._dynamo.reset()
    if dist.is_main:
        log.warning("torch.compile does not work here (%s); going on without it", failure)
    return failure


def _find_compile_failure(model: nn.Module, parallelized: nn.Module, trial: Callable[[nn.Module], torch.Tensor]) -> str:
    """Run the trials; return the error of the compiler in one line, empty if there is none."""
    try:
        with AveragedGradients(parallelized, world_size=1).micro_batch(is_last=False):
            trial(parallelized).backward()
        model.eval()
        with torch.no_grad():
            trial(model)
    except Exception as error:  # the compiler raises many: no C++ compiler, no Triton, an unsupported Python
        if (cause := _find_out_of_memory(error)) is not None:
            raise cause from None
        return first_line(error) or type(error).__name__
    finally:
        model.train()
        model.zero_grad(set_to_none=True)
    return ""


def _find_out_of_memory(error: BaseException | None) -> BaseException | None:
    """Return the error of an allocation that failed, if `error` is one or was caused by one."""
    while error is not None and not isinstance(error, torch.OutOfMemoryError | MemoryError):
        error = error.__cause__ or error.__context__
    return error


def build_gradient_sync(parallelized: nn.Module, dist: DistContext, config: ParallelConfig) -> GradientSync:
    """Return the gradient sync for what `parallelize` returned."""
    if config.reproducible:
        return TreeGradients(parallelized.parameters(), dist)
    return AveragedGradients(parallelized, dist.world_size)
