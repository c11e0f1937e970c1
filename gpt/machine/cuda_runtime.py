"""Settings of the process on a CUDA device: memory allocator, precision of float32 matmuls, deterministic kernels."""

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from gpt.errors import UserError

ALLOCATOR_VARIABLES = ("PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_ALLOC_CONF")
"""Settings of torch's allocator, in the order in which it looks for them."""
EXPANDABLE_SEGMENTS = "expandable_segments:True"
CUBLAS_WORKSPACE = "CUBLAS_WORKSPACE_CONFIG"
DETERMINISTIC_WORKSPACES = (":4096:8", ":16:8")
"""Workspaces with which cuBLAS computes the same bits every time (cuBLAS documentation, "Results Reproducibility")."""

NO_DETERMINISTIC_FORM = " does not have a deterministic implementation"
"""Part of torch's message after the name of the operator (aten/src/ATen/Context.cpp)."""


def set_up_cuda(*, reproducible: bool) -> dict[str, bool]:
    """Apply the settings of the process for CUDA, and return those that are in effect.

    Call it before CUDA is initialized, because torch reads the allocator's settings then.

    Args:
        reproducible: whether the same device must compute the same bits every time.

    Raises:
        UserError: CUBLAS_WORKSPACE_CONFIG is set to a workspace that is not deterministic.
    """
    torch.set_float32_matmul_precision("high")  # TF32 where the device has it
    if reproducible:
        _use_deterministic_kernels()
    return {
        "expandable_segments": _expand_segments(),
        "deterministic": torch.are_deterministic_algorithms_enabled(),
    }


def uses_tf32() -> bool:
    """Return whether float32 matmuls on the current device are computed in TF32."""
    is_allowed = torch.get_float32_matmul_precision() != "highest" and torch.version.hip is None
    return is_allowed and torch.cuda.get_device_capability() >= (8, 0)


@contextmanager
def name_nondeterministic_operator() -> Iterator[None]:
    """Replace torch's error about an operator that has no deterministic form on this device by one line.

    Raises:
        UserError: instead of that error; names the operator.
    """
    try:
        yield
    except RuntimeError as error:
        operator, found, _ = str(error).partition(NO_DETERMINISTIC_FORM)
        if not found:
            raise
        raise UserError(
            f"--parallel.reproducible: {operator.split()[-1]} has no deterministic form on this device; change the "
            "model so that it does without, or add --parallel.no-reproducible"
        ) from error


def describe_gpu() -> dict[str, str]:
    """Return the facts on which the bits of a GPU's results depend; empty in a process that uses no GPU."""
    if not torch.cuda.is_initialized():
        return {}
    major, minor = torch.cuda.get_device_capability()
    kernels = "deterministic kernels" if torch.are_deterministic_algorithms_enabled() else "fastest kernels"
    return {
        "gpu": f"{torch.cuda.get_device_name()}, capability {major}.{minor}",
        "cuda": f"{torch.version.cuda or torch.version.hip}, cuDNN {torch.backends.cudnn.version()}, {kernels}",
    }


def _expand_segments() -> bool:
    """Let the allocator's segments grow instead of fragmenting, unless the user has set its variable.

    Micro-batches of changing sizes otherwise leave gaps: PyTorch's "CUDA semantics", section "Optimizing memory usage".
    Windows lacks the calls that it needs.
    """
    given = next((os.environ[name] for name in ALLOCATOR_VARIABLES if os.environ.get(name)), "")
    if not given and sys.platform.startswith("linux") and not torch.cuda.is_initialized():
        given = os.environ["PYTORCH_ALLOC_CONF"] = EXPANDABLE_SEGMENTS
    return EXPANDABLE_SEGMENTS in given


def _use_deterministic_kernels() -> None:
    """Restrict torch to deterministic kernels; an operator that has none raises an error that names it.

    cuDNN's attention is turned off, because its backward pass has no deterministic form that torch can ask for. The
    other implementations obey `use_deterministic_algorithms`. The compiler chooses kernels by their form instead of
    their time.
    """
    import torch._inductor.config

    workspace = os.environ.setdefault(CUBLAS_WORKSPACE, DETERMINISTIC_WORKSPACES[0])
    if workspace not in DETERMINISTIC_WORKSPACES:
        raise UserError(
            f"--parallel.reproducible: {CUBLAS_WORKSPACE} is {workspace!r}, with which cuBLAS is not deterministic; "
            f"unset it, or set {' or '.join(DETERMINISTIC_WORKSPACES)}"
        )
    torch.use_deterministic_algorithms(True)
    torch.backends.cudnn.benchmark = False
    torch.backends.cuda.enable_cudnn_sdp(False)
    torch._inductor.config.deterministic = True
