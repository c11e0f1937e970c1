"""The optimizer."""

from pydantic import Field

from gpt.configs.base import Config


class OptimizerConfig(Config):
    """AdamW; decay applies to matrices only, never to biases and norms."""

    weight_decay: float = Field(0.1, ge=0)
    """Decoupled weight decay of the matrices."""
    beta1: float = Field(0.9, ge=0, lt=1)
    """Decay of the gradient's running mean."""
    beta2: float = Field(0.95, ge=0, lt=1)
    """Decay of the squared gradient's running mean."""
