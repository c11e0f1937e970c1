"""Settings of the process that make training on a CPU fast."""

import ctypes
import logging
import os
import sys

import torch

from gpt.configs.runtime_config import RuntimeConfig
from gpt.machine.arithmetic_check import digest_matmuls
from gpt.machine.resources import usable_cores
from gpt.machine.spinning import sleep_when_busy
from gpt.ops import attention_cpu

log = logging.getLogger(__name__)

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # glibc, malloc.h
MAX_REUSED_BYTES = 2**30
"""Largest block that glibc reuses when it was freed."""
NEVER = -1
VECTOR_MATH_FUNCTIONS = (
    "acos", "asin", "atan", "cos", "erf", "erfc", "erfinv", "exp", "expm1",
    "log", "log10", "log1p", "log2", "sin", "sqrt", "tan", "tanh", "trunc",
)  # fmt: skip
"""Functions that torch may hand to MKL, a chunk per thread (aten/src/ATen/cpu/vml.h)."""


def keep_freed_memory() -> bool:
    """Let glibc reuse large blocks that were freed, and return whether it could be set.

    By default glibc returns every block of 32 MiB or more to the kernel, which maps and zeroes it again, page by page,
    at each step (mallopt(3), M_MMAP_THRESHOLD). Takes effect for blocks that are allocated from now on.
    """
    if not sys.platform.startswith("linux"):
        return False
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError):  # another libc, such as musl
        return False
    return bool(mallopt(M_MMAP_THRESHOLD, MAX_REUSED_BYTES) and mallopt(M_TRIM_THRESHOLD, NEVER))


def initialize_vector_math() -> None:
    """Call each function of MKL's vector math once on one thread, so that its first call by several is right.

    MKL chooses the code of a function at the function's first call. Where threads make that call together, one of them
    may compute with another code, whose relative error is 1e-4 (https://github.com/pytorch/pytorch/issues/188792):
    tables of rotary embeddings then differ between two runs of the same command.
    """
    for dtype in (torch.float32, torch.float64):
        for name in VECTOR_MATH_FUNCTIONS:
            getattr(torch, name)(torch.full((1,), 0.5, dtype=dtype))


def match_openmp_team() -> None:
    """Let torch use as many threads as OpenMP really gives it, which environment variables can make fewer.

    oneDNN divides a matmul among torch's number of threads. If OpenMP starts fewer, the rest of the result is never
    computed. OMP_DYNAMIC starts fewer when the machine is busy, so it is turned off. OMP_THREAD_LIMIT and
    OMP_MAX_ACTIVE_LEVELS cannot be, so torch's number is lowered.
    """
    wanted = torch.get_num_threads()
    team = _count_openmp_team(wanted)
    if team < wanted:
        torch.set_num_threads(team)
        names = [name for name in ("OMP_THREAD_LIMIT", "OMP_MAX_ACTIVE_LEVELS") if name in os.environ]
        reason = f" ({', '.join(f'{name}={os.environ[name]}' for name in names)})" if names else ""
        log.warning("OpenMP starts only %d of %d threads%s; the run uses %d", team, wanted, reason, team)


def _count_openmp_team(wanted: int) -> int:
    """Start a team of threads and count them; returns `wanted` if torch's OpenMP library cannot be asked."""
    try:
        library = ctypes.CDLL(None)
        start_team = library.GOMP_parallel  # LLVM's library has it, too
        library.omp_set_dynamic(0)
    except (OSError, AttributeError, TypeError):  # Windows, or a torch without OpenMP
        return wanted
    members: list[None] = []
    join_team = ctypes.CFUNCTYPE(None, ctypes.c_void_p)(lambda _: members.append(None))
    start_team.argtypes = [type(join_team), ctypes.c_void_p, ctypes.c_uint, ctypes.c_uint]
    start_team(join_team, None, wanted, 0)
    return max(1, len(members))


def set_up_cpu(config: RuntimeConfig, *, reproducible: bool = False) -> dict[str, int | bool]:
    """Apply the settings of `config`, and return those that are in effect, under the same names.

    Call it before the first operation: the threads of a pool inherit the treatment of denormals from their creator.

    Unless `config` gives a number of threads, it is only ever lowered: torch counts the machine's cores (of two threads
    of a core one, if it is built with MKL), and a container may have fewer. OMP_NUM_THREADS, which torchrun sets, has
    precedence.

    Args:
        config: the settings.
        reproducible: whether bits must be equal on every machine. The number of threads decides the last bits of some
            operations, so one thread computes unless `config` gives a number.
    """
    threads = config.threads or (1 if reproducible else 0)
    if threads:
        torch.set_num_threads(threads)
    elif "OMP_NUM_THREADS" not in os.environ and torch.get_num_threads() > usable_cores():
        torch.set_num_threads(usable_cores())
    keeps_freed_memory = config.keep_freed_memory and keep_freed_memory()
    flushes_denormals = config.flush_denormals and torch.set_flush_denormal(True)
    initialize_vector_math()
    match_openmp_team()  # starts the pool of threads
    digest_matmuls()  # before a background save asks for it
    return {
        "threads": torch.get_num_threads(),
        "keep_freed_memory": keeps_freed_memory,
        "flush_denormals": flushes_denormals,
        "fused_attention": attention_cpu.set_enabled(config.fused_attention),
        "sleep_when_busy": sleep_when_busy(torch.get_num_threads(), enabled=config.sleep_when_busy),
    }
