"""Configuration of the optimizer, by default AdamW; `TrainConfig` sets that of the quickstart run."""

from typing import Annotated, Literal

from pydantic import Field

from gpt.configs.base import Config
from gpt.configs.resume_rule import NEEDS_FLAG


class OptimizerConfig(Config):
    """AdamW, or Muon for the blocks' matrices and AdamW for the rest; weight decay applies to matrices only."""

    # FORBIDDEN: another optimizer cannot read the saved state.
    name: Literal["adamw", "muon"] = "adamw"
    """muon orthogonalises the updates of the blocks' matrices and leaves the other weights to adamw."""
    muon_lr: Annotated[float, NEEDS_FLAG] = Field(0.02, gt=0)
    """Highest learning rate of muon's matrices; lr.max_lr applies to the rest, and both follow one schedule."""
    muon_momentum: Annotated[float, NEEDS_FLAG] = Field(0.95, ge=0, lt=1)
    """Decay of muon's running mean of the gradient."""
    weight_decay: Annotated[float, NEEDS_FLAG] = Field(0.1, ge=0)
    """Decoupled weight decay of the matrices."""
    beta1: Annotated[float, NEEDS_FLAG] = Field(0.9, ge=0, lt=1)
    """Decay of adamw's running mean of the gradient."""
    beta2: Annotated[float, NEEDS_FLAG] = Field(0.95, ge=0, lt=1)
    """Decay of adamw's running mean of the squared gradient."""
