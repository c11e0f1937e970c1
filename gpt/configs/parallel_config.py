"""How the model is made ready to train on one process or many."""

from typing import Literal

from pydantic import Field

from gpt.configs.base import MAX_COUNT, Config


class ParallelConfig(Config):
    """What is applied to the model, and how its processes keep together; nothing but rounding changes."""

    activation_checkpointing: Literal["none", "block", "selective"] = "none"
    """Less memory for more arithmetic: block makes each block's activations again in the backward pass; selective keeps
    its products of matrices and makes the rest again."""
    reproducible: bool = False
    """Add gradients in a fixed order, so that on a CPU every bit is the same at 1, 2, 4, ... processes; each computes
    with one thread, unless --runtime.threads says otherwise."""
    check_replicas: int = Field(100, ge=0, le=MAX_COUNT)
    """Steps between comparisons of the processes' weights, which are also compared before a checkpoint; 0: never."""
    step_timeout: float = Field(600, ge=1, le=86_400)
    """Seconds that a step waits for a process before the run is given up, to be started again."""
