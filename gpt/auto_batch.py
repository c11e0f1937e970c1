"""How many sequences a micro-batch may have: `--micro-batch-size auto` tries the model before the plan is made."""

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
from gpt.machine.memory import max_size_by_measure, max_size_by_trial
from gpt.machine.resources import memory_to_plan_with
from gpt.models.gpt import GPT
from gpt.parallel.activation_checkpointing import checkpoint_activations
from gpt.utils.distributed import DistContext
from gpt.utils.launch import local_world_size

Autocast = Callable[[], AbstractContextManager[object]]

USEFUL_TOKENS = 4096
"""Of a micro-batch on a CPU: more are hardly faster, see docs/EXPERIMENTS.md."""
GPU_MARGIN = 0.05
"""Of a GPU's memory, what stays free: an allocator's blocks do not always fit."""


def autocast_of(plan: RunPlan) -> Autocast:
    """The context of every forward pass, which computes in the plan's type."""
    return partial(torch.autocast, plan.machine.device, getattr(torch, plan.dtype), enabled=plan.dtype != "float32")


def trial_loss(
    model: nn.Module, n_sequences: int, *, block_size: int, masked: bool, device: torch.device, autocast: Autocast
) -> torch.Tensor:
    """The loss of `n_sequences` that say nothing: a forward pass as in training, its graph kept."""
    tokens = torch.zeros((n_sequences, block_size), dtype=torch.int64, device=device)
    with autocast():
        loss: torch.Tensor = model(tokens, tokens, tokens if masked else None)
    return loss


def resolve_auto_micro_batch(config: TrainConfig, plan: RunPlan, dist: DistContext) -> RunPlan:
    """The plan, with a micro-batch that fits where its size is left to the machine.

    Raises:
        UserError: not even one sequence fits.
    """
    if config.micro_batch_size != "auto":
        return plan
    machine = replace(plan.machine, max_micro_batch=max_micro_batch(config, plan, dist))
    return resolve(config, machine, plan.corpus)


def max_micro_batch(config: TrainConfig, plan: RunPlan, dist: DistContext) -> int:
    """The most sequences that a micro-batch may have, the same on every process.

    A GPU's is found by trying. A CPU that runs out of memory ends the process, or crawls: there it is computed from
    what one and two sequences take, and is no larger than is of use.

    Args:
        config: of the run.
        plan: resolved with some size.
        dist: of the run.

    Raises:
        UserError: not even one fits.
    """
    model = GPT(plan.model, seed=plan.seed).to(dist.device)
    checkpoint_activations(model.h, config.parallel.activation_checkpointing)
    forward = partial(
        trial_loss,
        model,
        block_size=plan.batch.block_size,
        masked=config.data.document_mask,
        device=dist.device,
        autocast=autocast_of(plan),
    )

    def attempt(n_sequences: int) -> None:
        for _ in range(2):  # the second has the gradients of the first beside it, as in accumulation
            forward(n_sequences).backward()

    sizes = find_divisors(plan.batch.sequences_per_step // dist.world_size)
    weights = sum(parameter.nbytes for parameter in model.parameters())
    states = 2 * weights  # of AdamW; Muon keeps less
    if dist.device.type == "cuda":
        kept_free = int(GPU_MARGIN * torch.cuda.mem_get_info(dist.device)[1])
        most = max_size_by_trial(attempt, sizes, reserved=states + kept_free, device=dist.device)
    else:
        room = memory_to_plan_with() // local_world_size() - 2 * weights - states  # weights and gradients
        useful = max(1, USEFUL_TOKENS // plan.batch.block_size)
        most = min(useful, max_size_by_measure(lambda n: forward(n).backward(), sizes, room))
    most = dist.min(most)
    if most == 0:
        raise UserError(
            f"--micro-batch-size auto: not even one sequence of {plan.batch.block_size} tokens fits in memory; lower "
            "--model.block-size or the model's other sizes, or take --parallel.activation-checkpointing block"
        )
    return most
