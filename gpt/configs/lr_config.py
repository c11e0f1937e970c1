"""The learning rate over the course of a run."""

from typing import Literal, Self

from pydantic import Field, model_validator

from gpt.configs.base import MAX_COUNT, Config


class LRConfig(Config):
    """Warmup to `max_lr`, then a decay; `gpt/utils/custom_scheduler.py` has the formulas."""

    schedule: Literal["cosine", "linear", "wsd", "inverse-sqrt", "constant"] = "linear"
    """Shape after warmup; wsd holds max_lr and decays at the end of the run."""
    max_lr: float = Field(2e-3, gt=0)
    """Highest learning rate."""
    min_lr: float = Field(0.0, ge=0)
    """Lowest learning rate of a decay."""
    warmup_steps: int = Field(40, ge=0, le=MAX_COUNT)
    """Steps of linear warmup; the first step's rate is max_lr / warmup_steps."""
    decay_steps: int = Field(0, ge=0, le=MAX_COUNT)
    """Steps that the decay takes; 0: all after warmup (cosine, linear), a fifth of the run (wsd)."""

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.min_lr > self.max_lr:
            raise ValueError(
                f"min_lr={self.min_lr:g} is above max_lr={self.max_lr:g}; lower it to {self.max_lr:g} or less"
            )
        if self.decay_steps and self.schedule in ("inverse-sqrt", "constant"):
            raise ValueError(
                f"decay_steps={self.decay_steps} means nothing for schedule={self.schedule}; "
                "leave it 0 or take cosine, linear or wsd"
            )
        return self
