"""Check of this process's matmuls against NumPy, before a run computes anything with them.

A driver, an environment variable or a build can make a library multiply wrongly without any error. With
`OMP_THREAD_LIMIT=1`, for example, oneDNN splits a bfloat16 matmul for more threads than OpenMP gives it, and part of
the result is whatever was in memory.
"""

import hashlib
import json
import math
import os
import platform
import time
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from gpt.configs.gpt_config import GPTConfig
from gpt.errors import UserError
from gpt.machine.flops import linear_layers
from gpt.machine.peak_flops import read_record, write_record

MAX_SIZE = 2048
"""Bound of the rows and columns of the matrices."""
DIGEST_SIZES = ((256, 1031), (192, 1031))
"""Matrices whose product has other bits with every kernel that was tried, in float32 and in bfloat16."""
FEW_ROWS = 32
"""Rows with which every shape is checked first."""
MAX_SECONDS = 0.2
"""Time for the matmuls of all dtypes; those with few rows come first, and no further one is begun after it."""
MAX_ERROR_IN_EPS = 2.0
"""Bound of the error of a row's checksum, in units of the dtype's machine epsilon; rounding stays below 0.6."""
MIN_ERROR_BOUND = {"cpu": 1e-5, "cuda": 4e-3, "mps": 1e-4}
"""Bound of that error in float32: sums in another order, and TF32 on CUDA."""
SUSPECTS = ("ATEN_", "DNNL_", "GOMP_", "KMP_", "MKL_", "OMP_", "ONEDNN_")
"""Prefixes of environment variables that change what a library computes on a CPU; an error message names them."""
VARIABLES = (*SUSPECTS, "CUBLAS_", "LD_", "NVIDIA_", "OPENBLAS_", "TORCH_")
"""Prefixes of all variables that are part of the cache's key."""


class Matmul(NamedTuple):
    """Shape of a matmul: (rows, n_inner) times (n_inner, columns)."""

    rows: int
    n_inner: int
    columns: int


def require_right_arithmetic(
    device: torch.device, device_name: str, dtype: str, model: GPTConfig, rows: int, cache_dir: Path
) -> None:
    """Check matmuls of a model's linear layers, forward and backward, in `dtype` and in float32.

    A result that is right is cached; one that is wrong is found again at every start.

    Args:
        device: the device.
        device_name: part of the cache's key, with the machine's name, versions, threads and environment variables.
        dtype: float32, bfloat16 or float16.
        model: resolved configuration, vocab_size included.
        rows: tokens of a micro-batch.
        cache_dir: folder of the cache; nothing is cached if it cannot be written to.

    Raises:
        UserError: the machine computes wrongly; names the dtype and the remedy.
    """
    shapes = list_matmuls(model, rows)
    key = [
        *(device_name, platform.node(), torch.__version__, np.__version__, torch.get_num_threads(), dtype),
        *(sorted(read_variables(VARIABLES).items()), shapes),
    ]
    path = cache_dir / f"arithmetic-{hashlib.sha256(json.dumps(key).encode()).hexdigest()[:16]}.json"
    if read_record(path).get("is_right") is True:
        return
    dtypes = dict.fromkeys([dtype, "float32"])
    for name in dtypes:
        deadline = time.perf_counter() + MAX_SECONDS / len(dtypes)
        wrong = find_wrong_matmul(device, getattr(torch, name), shapes, deadline)
        if wrong is not None:
            raise UserError(_describe(wrong, device, name, shapes))
    write_record(path, {"device, machine, torch, numpy, threads, dtype, variables, shapes": key, "is_right": True})


@cache
def digest_matmuls() -> str:
    """Return a digest of the bits of small matmuls in float32 and bfloat16 on the CPU.

    It shows which kernels the libraries use: a variable such as ONEDNN_MAX_CPU_ISA or MKL_CBWR chooses others, and so
    does another CPU. Computed once, at a time when no step is computed.
    """
    generator, digest = np.random.default_rng(0), hashlib.sha256()
    a, b = (torch.from_numpy(generator.random(size, np.float32) - 0.5) for size in DIGEST_SIZES)
    for dtype in (torch.float32, torch.bfloat16):
        product = torch.nn.functional.linear(a.to(dtype), b.to(dtype))
        digest.update(product.float().numpy().tobytes())
    return digest.hexdigest()[:16]


def list_matmuls(model: GPTConfig, rows: int) -> list[Matmul]:
    """Return the matmuls of a model's linear layers: all of them with few rows, then with as many as a micro-batch has.

    Args:
        model: resolved configuration, vocab_size included.
        rows: tokens of a micro-batch.
    """
    matmuls: dict[Matmul, None] = {}
    for n_rows in sorted({min(rows, FEW_ROWS), min(rows, MAX_SIZE)}):
        for linear in linear_layers(model):
            n_in, n_out = min(linear.n_in, MAX_SIZE), min(linear.n_out, MAX_SIZE)
            output, input_gradient = Matmul(n_rows, n_in, n_out), Matmul(n_rows, n_out, n_in)
            matmuls |= dict.fromkeys([output, input_gradient, Matmul(n_out, n_rows, n_in)])
    return list(matmuls)


def find_wrong_matmul(
    device: torch.device, dtype: torch.dtype, shapes: Sequence[Matmul], deadline: float = math.inf
) -> Matmul | None:
    """Return the first matmul that is wrong; None if all that were checked before the deadline are right.

    Each row of a product C = A B is compared by a checksum with random signs s (Freivalds 1977, "Probabilistic Machines
    Can Use Less Running Time"):

        C s = A (B s), computed by NumPy in float64
    """
    bound = max(
        MAX_ERROR_IN_EPS * torch.finfo(dtype).eps, MIN_ERROR_BOUND[device.type] if dtype == torch.float32 else 0
    )
    flops_per_second = math.inf
    for shape in shapes:
        began, flops = time.perf_counter(), 2 * math.prod(shape)
        if began + flops / flops_per_second > deadline:
            continue
        if not _measure_error(device, dtype, shape) <= bound:  # NaN is wrong, too
            return shape
        flops_per_second = flops / (time.perf_counter() - began)
    return None


def read_variables(prefixes: tuple[str, ...]) -> dict[str, str]:
    """Return the environment variables whose names begin with one of `prefixes`."""
    return {name: value for name, value in sorted(os.environ.items()) if name.startswith(prefixes)}


def _measure_error(device: torch.device, dtype: torch.dtype, shape: Matmul) -> float:
    """Return the largest error of a row's checksum, relative to their root mean square."""
    generator = np.random.default_rng(0)  # torch's generator does not advance
    signs = generator.choice((-1.0, 1.0), shape.columns)
    a, b = (generator.random((n, shape.n_inner), np.float32) - 0.5 for n in (shape.rows, shape.columns))
    a_on_device, b_on_device = (torch.from_numpy(matrix).to(device, dtype) for matrix in (a, b))
    product = torch.nn.functional.linear(a_on_device, b_on_device).float().cpu().numpy()
    a, b = (matrix.float().cpu().numpy() for matrix in (a_on_device, b_on_device))  # as rounded to dtype
    with np.errstate(all="ignore"):
        expected = a.astype(np.float64) @ (signs @ b.astype(np.float64))
        errors = np.abs(product.astype(np.float64) @ signs - expected)
        return float(errors.max() / np.sqrt(np.mean(expected**2)))


def _describe(wrong: Matmul, device: torch.device, dtype: str, shapes: Sequence[Matmul]) -> str:
    """Return the error message for a wrong matmul; the remedy is tried before it is named."""
    threads = torch.get_num_threads()
    place = f"{device.type} in {dtype} with {threads} threads" if device.type == "cpu" else f"{device.type} in {dtype}"
    size = f"({wrong.rows}, {wrong.n_inner}) x ({wrong.n_inner}, {wrong.columns})"
    remedies = [f"unset {' and '.join(names)}"] if (names := list(read_variables(SUSPECTS))) else []
    if device.type == "cpu" and threads > 1:
        torch.set_num_threads(1)
        if find_wrong_matmul(device, getattr(torch, dtype), shapes[: shapes.index(wrong) + 1]) is None:
            remedies.append("add --runtime.threads 1")
        torch.set_num_threads(threads)
    if dtype != "float32":
        remedies.append("add --dtype float32")
    return (
        f"this machine multiplies wrongly on {place}: a matmul of {size} differs from NumPy's; "
        f"{', or '.join(remedies) or 'use another machine or another build of torch'}"
    )
