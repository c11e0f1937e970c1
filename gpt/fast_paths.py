"""Try the fast paths of a GPU before the plan is final, so that the plan and lineage.jsonl say which way each went."""

from dataclasses import replace

import torch

from gpt.checkpoint.staging import can_pin_memory
from gpt.configs.run_plan import RunPlan
from gpt.configs.train_config import TrainConfig
from gpt.ops.attention import supports_flex
from gpt.ops.cross_entropy import loss_kernel_works
from gpt.utils.distributed import DistContext


def try_fast_paths(config: TrainConfig, plan: RunPlan, dist: DistContext) -> RunPlan:
    """Return the plan with the fast paths in its runtime settings: true where every rank takes it, else false.

    A CPU has none of them.

    Args:
        config: the configuration of the run.
        plan: resolved for it.
        dist: the ranks.
    """
    if dist.device.type != "cuda":
        return plan
    model, dtype = plan.model, getattr(torch, plan.dtype)
    works = {"triton_loss": loss_kernel_works(dist.device, dtype, model.logit_softcap)}
    if config.data.document_mask or 0 < model.sliding_window < plan.batch.block_size:
        works["flex_attention"] = supports_flex(dist.device, dtype, dropout=model.dropout, head_dim=model.head_dim)
    if config.checkpoint.asynchronous:
        works["pinned_staging"] = can_pin_memory()
    agreed = {name: bool(dist.min(int(value))) for name, value in works.items()}
    return replace(plan, machine=replace(plan.machine, runtime=plan.machine.runtime | agreed))
