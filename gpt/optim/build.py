"""AdamW with decay on matrices only."""

import torch
from torch import nn

from gpt.configs.optimizer_config import OptimizerConfig


def build_optimizer(model: nn.Module, config: OptimizerConfig, max_lr: float) -> torch.optim.Optimizer:
    """AdamW (Loshchilov and Hutter 2019), as one fused kernel, which cpu, cuda and mps all have.

    The rate of the groups is set before every update by `set_learning_rate`.
    """
    return torch.optim.AdamW(
        decay_groups(model, config.weight_decay),
        lr=max_lr,
        betas=(config.beta1, config.beta2),
        fused=True,
    )


def decay_groups(model: nn.Module, weight_decay: float) -> list[dict[str, object]]:
    """Matrices, which decay, and vectors (biases, norms), which do not: GPT-3 paper, appendix B, and nanoGPT."""
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    groups = (
        {"params": [p for p in parameters if p.dim() >= 2], "weight_decay": weight_decay},
        {"params": [p for p in parameters if p.dim() < 2], "weight_decay": 0.0},
    )
    return [group for group in groups if group["params"]]


def set_learning_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    """The rate of the next update."""
    for group in optimizer.param_groups:
        group["lr"] = rate
