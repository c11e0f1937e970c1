"""What is set in the process so that a CPU trains fast."""

from pydantic import Field

from gpt.configs.base import Config


class RuntimeConfig(Config):
    """Settings of the process; docs/EXPERIMENTS.md has what each is worth."""

    threads: int = Field(0, ge=0, le=2**16)
    """Threads that compute, per process; 0: torch's own number (a core each, or OMP_NUM_THREADS), within the cores
    that the process may use."""
    keep_freed_memory: bool = True
    """Let the allocator keep large blocks that were freed, for the next step to use: faster, with more memory held."""
    flush_denormals: bool = False
    """Take numbers below the smallest normal one as zero, on CPUs that are slow with them."""
    fused_attention: bool = True
    """Compute attention of bfloat16 by gpt/ops/attention_cpu.c: on CPUs with AVX512_BF16, where the installation found
    a C compiler."""
