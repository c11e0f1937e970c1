"""Configuration of the learning-rate schedule; `TrainConfig` sets that of the quickstart run."""

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from gpt.configs.base import MAX_COUNT, Config
from gpt.configs.resume_rule import NEEDS_FLAG, SAFE_IF_LR_UNCHANGED


class LRConfig(Config):
    """Linear warmup to `max_lr`, then a decay; `gpt/utils/custom_scheduler.py` has the formulas."""

    schedule: Annotated[Literal["cosine", "linear", "wsd", "inverse-sqrt", "constant"], NEEDS_FLAG] = "linear"
    """Shape after warmup; wsd (warmup, stable, decay) holds max_lr and decays at the end of the run."""
    max_lr: Annotated[float, NEEDS_FLAG] = Field(2e-3, gt=0)
    """Highest learning rate; with muon, that of the weights outside the blocks' matrices."""
    min_lr: Annotated[float, NEEDS_FLAG] = Field(0.0, ge=0)
    """Lowest learning rate of the decay."""
    warmup_steps: Annotated[int, NEEDS_FLAG] = Field(40, ge=0, le=MAX_COUNT)
    """Steps of linear warmup; the first step's learning rate is max_lr / warmup_steps."""
    decay_steps: Annotated[int, SAFE_IF_LR_UNCHANGED] = Field(0, ge=0, le=MAX_COUNT)
    """Steps of decay; 0: all steps after warmup (cosine, linear), a fifth of the run (wsd)."""

    @model_validator(mode="after")
    def _require_consistent(self) -> Self:
        if self.min_lr > self.max_lr:
            raise ValueError(f"min_lr={self.min_lr:g} is above max_lr={self.max_lr:g} (nearest: {self.max_lr:g})")
        if self.decay_steps and self.schedule in ("inverse-sqrt", "constant"):
            raise ValueError(
                f"decay_steps={self.decay_steps} has no effect with schedule={self.schedule}; "
                "set it to 0, or use cosine, linear or wsd"
            )
        return self
