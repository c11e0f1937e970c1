"""The optimizer of a configuration: AdamW with decay on matrices only, or Muon for the matrices of hidden layers."""

from collections.abc import Mapping, Set
from types import MappingProxyType
from typing import Any

import torch
from torch import nn

from gpt.configs.optimizer_config import OptimizerConfig
from gpt.optim.adamw import AdamW
from gpt.optim.muon import Muon


def build_optimizer(
    model: nn.Module,
    config: OptimizerConfig,
    max_lr: float,
    *,
    hidden: Mapping[torch.Tensor, tuple[int, ...]] = MappingProxyType({}),
    precision: torch.dtype = torch.float32,
) -> torch.optim.Optimizer:
    """AdamW, or Muon with it.

    Each group holds its highest rate as `max_lr`, and begins with it; `set_learning_rate` sets the rate of an update.

    Args:
        model: whose parameters it updates.
        config: which optimizer, and how.
        max_lr: highest rate of AdamW.
        hidden: the matrices that Muon takes, each with the rows of those that are fused in it.
        precision: type in which Muon orthogonalises.
    """
    betas = (config.beta1, config.beta2)
    optimizer: torch.optim.Optimizer
    if config.name == "adamw":
        optimizer = AdamW(decay_groups(model, config.weight_decay, max_lr), betas=betas)
    else:
        matrices: dict[str, Any] = {
            "params": list(hidden),
            "parts": list(hidden.values()),
            "weight_decay": config.weight_decay,
            "max_lr": config.muon_lr,
            "momentum": config.muon_momentum,
        }
        others = decay_groups(model, config.weight_decay, max_lr, without=hidden.keys())
        optimizer = Muon(matrices, others, betas=betas, precision=precision)
    set_learning_rate(optimizer, 1.0)
    return optimizer


def decay_groups(
    model: nn.Module, weight_decay: float, max_lr: float, without: Set[torch.Tensor] = frozenset()
) -> list[dict[str, Any]]:
    """Matrices, which decay, and vectors (biases, norms), which do not: GPT-3 paper, appendix B, and nanoGPT."""
    parameters = [p for p in model.parameters() if p.requires_grad and p not in without]
    groups = (
        {"params": [p for p in parameters if p.dim() >= 2], "weight_decay": weight_decay, "max_lr": max_lr},
        {"params": [p for p in parameters if p.dim() < 2], "weight_decay": 0.0, "max_lr": max_lr},
    )
    return [group for group in groups if group["params"]]


def set_learning_rate(optimizer: torch.optim.Optimizer, multiplier: float) -> None:
    """The rates of the next update: each group's own highest times the schedule's multiplier."""
    for group in optimizer.param_groups:
        group["lr"] = group["max_lr"] * multiplier
