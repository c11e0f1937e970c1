"""Configuration of the process: threads, memory allocator and CPU kernels."""

from typing import Annotated

from pydantic import Field

from gpt.configs.base import Config
from gpt.configs.resume_rule import SAFE


class RuntimeConfig(Config):
    """Process settings that make a CPU train fast; docs/EXPERIMENTS.md has the measured effect of each."""

    threads: Annotated[int, SAFE] = Field(0, ge=0, le=2**16)
    """Compute threads per process; 0: torch's default (one per core, or OMP_NUM_THREADS), at most the cores that the
    process may use."""
    keep_freed_memory: Annotated[bool, SAFE] = True
    """Reuse large freed blocks instead of returning them to the system: faster, but the process holds more memory."""
    flush_denormals: Annotated[bool, SAFE] = False
    """Treat numbers below the smallest normal one as zero, for CPUs that are slow with them."""
    fused_attention: Annotated[bool, SAFE] = True
    """Use the C kernel for bfloat16 attention, on CPUs with AVX512_BF16 where the installation found a C compiler."""
    sleep_when_busy: Annotated[bool, SAFE] = True
    """Let threads that wait for each other sleep instead of spin while other programs use the cores (Linux)."""
