"""Configuration of memory saving and of training with several processes."""

from typing import Annotated, Literal

from pydantic import Field

from gpt.configs.base import MAX_COUNT, Config
from gpt.configs.resume_rule import NEEDS_FLAG, SAFE


class ParallelConfig(Config):
    """Activation checkpointing and the coordination of several processes; results change by rounding at most."""

    activation_checkpointing: Annotated[Literal["none", "block", "selective"], SAFE] = "none"
    """Save memory by recomputing in the backward pass: block recomputes every activation of a block; selective saves
    the matmul results and recomputes the rest."""
    reproducible: Annotated[bool, NEEDS_FLAG] = False
    """Add gradients in a fixed order, so that on CPUs a run is bit-exact with 1, 2, 4, ... processes; each computes
    with one thread unless --runtime.threads sets another number. On CUDA also use deterministic kernels
    (docs/gpu.md)."""
    check_replicas: Annotated[int, SAFE] = Field(100, ge=0, le=MAX_COUNT)
    """Steps between checks that every process holds the same weights; also checked before a checkpoint; 0: never."""
    step_timeout: Annotated[float, SAFE] = Field(600, ge=1, le=86_400)
    """Seconds that a step waits for another process before the run stops with an error."""
    start_timeout: Annotated[float, SAFE] = Field(300, ge=1, le=86_400)
    """Seconds that the processes wait for each other at the start; a process that prepares data may take longer."""
