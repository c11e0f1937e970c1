"""Builds the optimizer: AdamW with weight decay on matrices only, or Muon for the hidden matrices with AdamW."""

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
    """Build AdamW, or Muon with AdamW for the parameters that it does not take.

    Each group holds its peak learning rate as `max_lr`, and starts with it; `set_learning_rate` sets that of an update.

    Args:
        model: the model to train.
        config: name and hyperparameters of the optimizer.
        max_lr: peak learning rate of AdamW.
        hidden: hidden matrices that Muon takes -> rows of each matrix that is fused in them.
        precision: dtype in which Muon orthogonalises.
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
    """Group the parameters: matrices decay, vectors (biases, norms) do not (GPT-3 paper, appendix B, and nanoGPT)."""
    parameters = [p for p in model.parameters() if p.requires_grad and p not in without]
    groups = (
        {"params": [p for p in parameters if p.dim() >= 2], "weight_decay": weight_decay, "max_lr": max_lr},
        {"params": [p for p in parameters if p.dim() < 2], "weight_decay": 0.0, "max_lr": max_lr},
    )
    return [group for group in groups if group["params"]]


def set_learning_rate(optimizer: torch.optim.Optimizer, multiplier: float) -> None:
    """Set each group's learning rate for the next update: lr = max_lr * multiplier of the schedule."""
    for group in optimizer.param_groups:
        group["lr"] = group["max_lr"] * multiplier
