"""Peak FLOP/s of a device: the rate of its fastest square matmuls, measured, and that of its data sheet."""

import contextlib
import hashlib
import json
import math
import os
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

from gpt.configs.gpt_config import GPTConfig
from gpt.configs.run_plan import RunPlan
from gpt.machine.data_sheet import find_data_sheet_peak
from gpt.machine.flops import linear_layers
from gpt.utils.distributed import DistContext
from gpt.utils.progress import work_line

MIN_ROWS, MAX_ROWS = 512, 8192
"""Rows of the square matrices: these, and the powers of two between."""
MAX_MATMUL_SECONDS = 0.02
"""Time of a matmul beyond which no larger matrices are tried.

Two Zen 4 cores reach their peak at 512 to 1024 rows, and lose 5 to 10% at 2048, in bfloat16 and in float32. A large GPU
needs 8192 rows, which take milliseconds.
"""
MAX_QUERIES = 1024
"""Queries of one sequence whose attention is measured; more need much memory and are no faster."""
SECONDS_PER_SHAPE = 0.05
"""Time for which a matmul is repeated."""
MIN_JOINT_SHARE = 0.5
"""Joint FLOP/s of all threads, as a share of what they reach one by one, below which other programs must be running."""


@dataclass(frozen=True)
class PeakFlops:
    """Peak FLOP/s of all ranks' devices together."""

    measured: float
    data_sheet: float | None
    """That of the GPU's data sheet; None if it is not known."""


def find_peak_flops(plan: RunPlan, dist: DistContext, cache_dir: Path) -> PeakFlops:
    """Return the peaks of a run's devices in its dtype; rank 0 measures for all.

    Args:
        plan: names the machine and the dtype.
        dist: the ranks.
        cache_dir: folder of the cache of measured peaks.
    """
    name = plan.machine.device_name
    with work_line("measuring the machine's peak FLOP/s", is_shown=dist.is_main):
        measured = dist.on_main(lambda: load_or_measure_peak_flops(dist.device, name, plan.dtype, cache_dir))
    data_sheet = find_data_sheet_peak(name, plan.dtype)
    return PeakFlops(
        measured=measured * dist.world_size,
        data_sheet=None if data_sheet is None else data_sheet * dist.world_size,
    )


def load_or_measure_peak_flops(device: torch.device, device_name: str, dtype: str, cache_dir: Path) -> float:
    """Return the device's peak FLOP/s, which is measured once and cached for later runs.

    Args:
        device: the device; float32 on CUDA is measured in the precision that torch is set to.
        device_name: part of the cache's key, with `dtype`, the number of threads and the version of torch.
        dtype: float32, bfloat16 or float16.
        cache_dir: folder of the cache; nothing is cached if it cannot be written to.
    """
    key = [device_name, dtype, torch.get_num_threads(), torch.__version__]
    path = cache_dir / f"peak-{hashlib.sha256(json.dumps(key).encode()).hexdigest()[:16]}.json"
    cached = read_record(path).get("flops_per_second")
    if isinstance(cached, (int, float)) and cached and math.isfinite(cached):
        return float(cached)
    measured = measure_peak_flops(device, getattr(torch, dtype))
    write_record(path, {"device, dtype, threads, torch": key, "flops_per_second": measured})
    return measured


def measure_peak_flops(device: torch.device, dtype: torch.dtype) -> float:
    """Measure the FLOP/s of square matmuls, of the best size and the best repetition."""
    return _measure_undisturbed(lambda: _measure_square_matmuls(device, dtype), device)


def measure_model_flops(device: torch.device, dtype: torch.dtype, model: GPTConfig, rows: int) -> float:
    """Measure the FLOP/s of all matmuls in a model's forward and backward pass, each in its own shape.

    Args:
        device: the device.
        dtype: dtype of the matrices.
        model: resolved configuration, vocab_size included.
        rows: tokens of a micro-batch.
    """
    flops, seconds = 0.0, 0.0
    for a, b, needed in _model_matmuls(device, dtype, model, rows):
        seconds += _time_matmul(a, b) * needed / (2 * a.numel() * b.shape[-1])
        flops += needed
    return flops / seconds


def synchronize(device: torch.device) -> None:
    """Wait for the work that is queued on the device; a CPU has no queue."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()


def _measure_undisturbed(measure: Callable[[], float], device: torch.device) -> float:
    """Return the FLOP/s that `measure` finds, corrected on a CPU that other programs use at the same time.

    The threads of a matmul wait for each other. On two Zen 4 cores with four busy processes the best of all repetitions
    was 10 to 40 times slower than on idle cores, while a single thread lost a few percent. Then the result is the
    FLOP/s of a single thread times the number of threads, which is right to 2% on idle cores. It is too high if cores
    clock lower when all are busy, so it is used only if the joint FLOP/s are below MIN_JOINT_SHARE of it.
    """
    joint = measure()
    threads = torch.get_num_threads()
    if device.type != "cpu" or threads == 1:
        return joint
    torch.set_num_threads(1)
    try:
        separate = threads * measure()
    finally:
        torch.set_num_threads(threads)
    return joint if joint > MIN_JOINT_SHARE * separate else separate


def _measure_square_matmuls(device: torch.device, dtype: torch.dtype) -> float:
    """Measure the FLOP/s of square matmuls with the current number of threads."""
    peak, size = 0.0, MIN_ROWS
    while True:
        a, b = (_random_matrix(size, size, device=device, dtype=dtype) for _ in range(2))
        best = _time_matmul(a, b)
        peak = max(peak, 2 * size**3 / best)
        if 8 * best > MAX_MATMUL_SECONDS or size == MAX_ROWS:
            return peak
        size *= 2


def _model_matmuls(
    device: torch.device, dtype: torch.dtype, model: GPTConfig, rows: int
) -> Iterator[tuple[torch.Tensor, torch.Tensor, int]]:
    """Yield two matrices of each shape, and the FLOPs of such matmuls in a step on `rows` tokens."""
    for n_in, n_out, layers in linear_layers(model):
        x = _random_matrix(rows, n_in, device=device, dtype=dtype)
        grad = _random_matrix(rows, n_out, device=device, dtype=dtype)
        weight = _random_matrix(n_out, n_in, device=device, dtype=dtype)
        for a, b in ((x, weight.T), (grad, weight), (grad.T, x)):  # output, input gradient, weight gradient
            yield a, b, layers * 2 * rows * n_in * n_out
    length, queries = model.block_size, min(model.block_size, MAX_QUERIES)
    q = _random_matrix(model.n_head, queries, model.head_dim, device=device, dtype=dtype)
    k = _random_matrix(model.n_head, length, model.head_dim, device=device, dtype=dtype)
    weights = _random_matrix(model.n_head, queries, length, device=device, dtype=dtype)
    # Shapes of: scores and gradients of weights; outputs and gradients of queries; gradients of keys and of values.
    # 2 matmuls of each shape, and half of the FLOPs: the causal mask hides the other half.
    for a, b in ((q, k.mT), (weights, k), (weights.mT, q)):
        yield a, b, 2 * model.n_layer * rows * length * model.n_head * model.head_dim


def _time_matmul(a: torch.Tensor, b: torch.Tensor) -> float:
    """Return the seconds of the fastest of many repetitions, because other programs can only slow one down.

    A first matmul, which chooses the kernel, does not count.
    """
    out = a @ b
    synchronize(a.device)
    best, now = math.inf, time.perf_counter()
    end = now + SECONDS_PER_SHAPE
    while best == math.inf or now < end:
        start = now
        torch.matmul(a, b, out=out)
        synchronize(a.device)
        now = time.perf_counter()
        best = min(best, now - start)
    return best


def _random_matrix(*size: int, device: torch.device, dtype: torch.dtype) -> torch.Tensor:
    """Return random numbers from a separate generator, so that the run's generator does not advance.

    Not constants: a GPU multiplies them faster than a model's weights, because fewer bits flip, and power is its limit
    (He 2024, "Strangely, Matrix Multiplications on GPUs Run Faster When Given 'Predictable' Data!").
    """
    generator = torch.Generator(device).manual_seed(0)
    return torch.empty(size, device=device, dtype=dtype).uniform_(-1, 1, generator=generator)


def read_record(path: Path) -> dict[str, object]:
    """Return a file of the cache; empty if there is none or it is damaged."""
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    return record if isinstance(record, dict) else {}


def write_record(path: Path, record: dict[str, object]) -> None:
    """Write a file of the cache in one step, without fsync: a measurement can be repeated."""
    temporary = path.with_name(f".{path.stem}-{os.getpid()}.tmp")  # not mkstemp's, which only its owner can read
    with contextlib.suppress(OSError):
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary.write_text(json.dumps(record), encoding="utf-8")
        temporary.replace(path)
