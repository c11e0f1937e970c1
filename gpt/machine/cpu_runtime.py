"""What is set in the process so that a CPU trains fast."""

import ctypes
import os
import sys

import torch

from gpt.configs.runtime_config import RuntimeConfig
from gpt.machine.resources import usable_cores
from gpt.ops import attention_cpu

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # glibc, malloc.h
KEPT_BYTES = 2**30
NEVER = -1


def keep_freed_memory() -> bool:
    """Let glibc keep large blocks that were freed, for the next step to use; whether it could be told.

    By default it gives every block of 32 MiB or more back to the kernel, which maps it again, zeroed page by page, at
    each step (mallopt(3), M_MMAP_THRESHOLD). Takes effect for blocks that are allocated from now on.
    """
    if not sys.platform.startswith("linux"):
        return False
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError):  # another libc, such as musl
        return False
    return bool(mallopt(M_MMAP_THRESHOLD, KEPT_BYTES) and mallopt(M_TRIM_THRESHOLD, NEVER))


def set_up_cpu(config: RuntimeConfig, *, reproducible: bool = False) -> dict[str, int | bool]:
    """Set what `config` says, and return what holds then, under its names.

    How many threads share an operation decides the last bits of some: where they are to be the same everywhere, one
    thread computes unless a number is given.

    Call it before the first operation: the threads of a pool take over how their maker treats denormals.

    Unasked the number of threads is only ever lowered: torch counts the machine's cores (of two threads of a core one,
    where it is built with MKL), and a container may have been given fewer. A number in OMP_NUM_THREADS stands, as
    torchrun sets it.
    """
    threads = config.threads or (1 if reproducible else 0)
    if threads:
        torch.set_num_threads(threads)
    elif "OMP_NUM_THREADS" not in os.environ and torch.get_num_threads() > usable_cores():
        torch.set_num_threads(usable_cores())
    return {
        "threads": torch.get_num_threads(),
        "keep_freed_memory": config.keep_freed_memory and keep_freed_memory(),
        "flush_denormals": config.flush_denormals and torch.set_flush_denormal(True),
        "fused_attention": attention_cpu.set_enabled(config.fused_attention),
    }
