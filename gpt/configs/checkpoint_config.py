"""Configuration of checkpoints: when the state is saved and which checkpoints are kept."""

from typing import Annotated

from pydantic import Field

from gpt.configs.base import Config
from gpt.configs.resume_rule import SAFE


class CheckpointConfig(Config):
    """Checkpoints of a run; the last step is always saved."""

    interval: Annotated[int, SAFE] = Field(200, ge=0)
    """Steps between checkpoints; 0: only the last step."""
    every_minutes: Annotated[float, SAFE] = Field(0.0, ge=0)
    """Also save when this many minutes have passed since the last checkpoint; 0: no time limit."""
    keep: Annotated[int, SAFE] = Field(2, ge=0)
    """Newest checkpoints to keep; 0: all."""
    keep_best: Annotated[bool, SAFE] = False
    """Also save after each evaluation with the lowest val/loss so far, and keep that checkpoint."""
    asynchronous: Annotated[bool, SAFE] = True
    """Write checkpoints in the background from a copy in host memory; off: training waits for the disk."""
