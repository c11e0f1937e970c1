"""The optimizer."""

from typing import Literal

from pydantic import Field

from gpt.configs.base import Config


class OptimizerConfig(Config):
    """AdamW, or Muon with it; decay applies to matrices only, never to biases and norms."""

    name: Literal["adamw", "muon"] = "adamw"
    """muon orthogonalises the updates of the blocks' matrices, and leaves the rest to adamw."""
    muon_lr: float = Field(0.02, gt=0)
    """Highest learning rate of muon's matrices; lr.max_lr is that of the rest, and both follow one schedule."""
    muon_momentum: float = Field(0.95, ge=0, lt=1)
    """Decay of muon's running mean of the gradient."""
    weight_decay: float = Field(0.1, ge=0)
    """Decoupled weight decay of the matrices."""
    beta1: float = Field(0.9, ge=0, lt=1)
    """Decay of adamw's running mean of the gradient."""
    beta2: float = Field(0.95, ge=0, lt=1)
    """Decay of adamw's running mean of the squared gradient."""
