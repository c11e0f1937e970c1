"""When a run's state is saved and how much of it is kept."""

from pydantic import Field

from gpt.configs.base import Config


class CheckpointConfig(Config):
    """Checkpoints of a run; the last step is saved whatever the interval."""

    interval: int = Field(200, ge=0)
    """Steps between checkpoints; 0: only the last step."""
    keep: int = Field(2, ge=0)
    """Newest checkpoints to keep; 0: all."""
