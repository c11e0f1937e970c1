"""Resolve `--micro-batch-size auto`: measure how many sequences fit in memory before the plan is final."""

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import replace
from functools import partial

import torch
from torch import nn

from gpt.configs.batch_plan import find_divisors
from gpt.configs.run_plan import RunPlan, resolve
from gpt.configs.train_config import TrainConfig
from gpt.errors import UserError
from gpt.machine.memory import extrapolate_max_size, search_max_size
from gpt.machine.resources import find_memory_budget
from gpt.models.gpt import GPT
from gpt.parallel.activation_checkpointing import checkpoint_activations
from gpt.utils.distributed import DistContext
from gpt.utils.launch import local_world_size

Autocast = Callable[[], AbstractContextManager[object]]

MAX_CPU_TOKENS = 4096
"""Tokens of a micro-batch beyond which a CPU gains no speed (docs/EXPERIMENTS.md)."""
GPU_MEMORY_MARGIN = 0.05
"""Share of a GPU's memory to leave free, since the allocator's blocks fragment."""


def build_autocast(plan: RunPlan) -> Autocast:
    """Return the context of every forward pass, which computes in the plan's dtype."""
    return partial(torch.autocast, plan.machine.device, getattr(torch, plan.dtype), enabled=plan.dtype != "float32")


def trial_loss(
    model: nn.Module, n_sequences: int, *, block_size: int, masked: bool, device: torch.device, autocast: Autocast
) -> torch.Tensor:
    """Compute the loss of `n_sequences` of one token id, as a training step does.

    The tensors are distinct, because compiled code is guarded by which of its inputs are the same.
    """
    tokens, targets, documents = torch.zeros((3, n_sequences, block_size), dtype=torch.int64, device=device)
    with autocast():
        loss: torch.Tensor = model(tokens, targets, documents if masked else None)
    return loss


def resolve_auto_micro_batch(config: TrainConfig, plan: RunPlan, dist: DistContext) -> RunPlan:
    """Return the plan, with the largest micro-batch that fits if its size is auto.

    Raises:
        UserError: not even one sequence fits.
    """
    if config.micro_batch_size != "auto":
        return plan
    machine = replace(plan.machine, max_micro_batch=max_micro_batch(config, plan, dist))
    return resolve(config, machine, plan.corpus)


def max_micro_batch(config: TrainConfig, plan: RunPlan, dist: DistContext) -> int:
    """Return the largest number of sequences per micro-batch that fits on every rank.

    On a GPU it is found by trying. A CPU that runs out of memory kills the process or swaps, so there the size is
    extrapolated from the memory of one and two sequences, and bounded by MAX_CPU_TOKENS.

    Args:
        config: the configuration of the run.
        plan: resolved with any micro-batch size.
        dist: the ranks of the run.

    Raises:
        UserError: not even one sequence fits.
    """
    model = GPT.build_empty(plan.model, dist.device, rounds_residuals=plan.rounds_residuals)
    for parameter in model.parameters():
        nn.init.zeros_(parameter)  # what is in memory may be NaN, or slow to compute with
    checkpoint_activations(model.h, config.parallel.activation_checkpointing)
    forward = partial(
        trial_loss,
        model,
        block_size=plan.batch.block_size,
        masked=config.data.document_mask,
        device=dist.device,
        autocast=build_autocast(plan),
    )

    def accumulate_twice(n_sequences: int) -> None:
        for _ in range(2):  # in the second pass the gradients of the first are in memory, too
            forward(n_sequences).backward()

    sizes = find_divisors(plan.batch.sequences_per_step // dist.world_size)
    weight_bytes = sum(parameter.nbytes for parameter in model.parameters())
    optimizer_bytes = 2 * weight_bytes  # AdamW; Muon needs less
    if dist.device.type == "cuda":
        margin = int(GPU_MEMORY_MARGIN * torch.cuda.mem_get_info(dist.device)[1])
        size = search_max_size(accumulate_twice, sizes, reserved=optimizer_bytes + margin, device=dist.device)
    else:
        gradient_bytes = weight_bytes
        room = find_memory_budget() // local_world_size() - weight_bytes - gradient_bytes - optimizer_bytes
        fitting = extrapolate_max_size(lambda n: forward(n).backward(), sizes, room)
        size = min(fitting, max(1, MAX_CPU_TOKENS // plan.batch.block_size))
    size = dist.min(size)
    if size == 0:
        raise UserError(
            f"--micro-batch-size auto: not even one sequence of {plan.batch.block_size} tokens fits in memory; lower "
            "--model.block-size or the model's other sizes, or add --parallel.activation-checkpointing block"
        )
    return size
