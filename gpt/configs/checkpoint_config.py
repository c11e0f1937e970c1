"""When a run's state is saved and how much of it is kept."""

from pydantic import Field

from gpt.configs.base import Config


class CheckpointConfig(Config):
    """Checkpoints of a run; the last step is saved whatever the interval."""

    interval: int = Field(200, ge=0)
    """Steps between checkpoints; 0: only the last step."""
    every_minutes: float = Field(0.0, ge=0)
    """Minutes between checkpoints, beside `interval`; 0: only steps count."""
    keep: int = Field(2, ge=0)
    """Newest checkpoints to keep; 0: all."""
    keep_best: bool = False
    """Save whenever an evaluation improves on val/loss, and keep the best one as well."""
    asynchronous: bool = True
    """Train on while a copy of the state in host memory is written; off: wait for the disk."""
