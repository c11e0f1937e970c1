"""What the device can do at best: the rate of its matrix products, measured."""

import contextlib
import hashlib
import json
import math
import os
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch

from gpt.configs.gpt_config import GPTConfig
from gpt.machine.flops import linear_layers

MIN_ROWS, MAX_ROWS = 512, 8192
"""Rows of the square matrices that are multiplied, and of all powers of two between."""
MAX_MATMUL_SECONDS = 0.02
"""Seconds; larger matrices than those whose product takes so long are not tried.

Two Zen 4 cores reach their peak at 512 to 1024 rows, and lose 5 to 10% at 2048, in bfloat16 as in float32; a large GPU
needs 8192, which takes it milliseconds.
"""
MAX_QUERIES = 1024
"""Of one sequence, whose attention is measured; more need much memory, and are no faster."""
SECONDS_PER_SHAPE = 0.05
"""How long a product is repeated."""
BUSY = 0.5
"""Part of what its threads reach apart below which a CPU must be busy with other things; see `_undisturbed`."""


def measured_peak_flops(device: torch.device, device_name: str, dtype: str, cache_dir: Path) -> float:
    """The rate of matrix products that this device reaches at best, in FLOP/s; measured once, and kept for later runs.

    Args:
        device: where to measure; float32 on CUDA is measured in the precision that torch is set to.
        device_name: what a measurement belongs to, together with `dtype`, the threads and the version of torch.
        dtype: float32, bfloat16 or float16.
        cache_dir: where measurements are kept; one that cannot be written to keeps none.
    """
    key = [device_name, dtype, torch.get_num_threads(), torch.__version__]
    path = cache_dir / f"peak-{hashlib.sha256(json.dumps(key).encode()).hexdigest()[:16]}.json"
    known = _read(path)
    if known:
        return known
    measured = measure_peak_flops(device, getattr(torch, dtype))
    _write(path, {"device, dtype, threads, torch": key, "flops_per_second": measured})
    return measured


def measure_peak_flops(device: torch.device, dtype: torch.dtype) -> float:
    """FLOP/s of square products of the best size, each at its best.

    Args:
        device: where.
        dtype: of the factors.
    """
    return _undisturbed(lambda: _square_rate(device, dtype), device)


def own_rate(device: torch.device, dtype: torch.dtype, model: GPTConfig, rows: int) -> float:
    """FLOP/s of all products of a model's forward and backward pass, each in its own shape, as they go just now.

    Args:
        device: where.
        dtype: of the factors.
        model: resolved, with its vocabulary filled in.
        rows: tokens of a micro-batch.
    """
    flops, seconds = 0.0, 0.0
    for a, b, needed in _own_products(device, dtype, model, rows):
        seconds += _shortest_product(a, b) * needed / (2 * a.numel() * b.shape[-1])
        flops += needed
    return flops / seconds


def synchronize(device: torch.device) -> None:
    """Wait until the device has done what it was given; a CPU has."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()


def _undisturbed(measure: Callable[[], float], device: torch.device) -> float:
    """The rate that `measure` finds, also on a CPU that other programs use at the same time.

    Threads of a product wait for each other. On two Zen 4 cores with four busy processes they were together 10 to 40
    times slower than on idle ones, at the best of all tries, while a thread alone stayed within a few percent. Then the
    rate is that of one thread times their number, which on the idle cores is right to 2%. Where all cores clock lower
    than one it is too high: it is taken only if the threads together are so slow that something must hold them up.
    """
    together = measure()
    threads = torch.get_num_threads()
    if device.type != "cpu" or threads == 1:
        return together
    torch.set_num_threads(1)
    try:
        apart = threads * measure()
    finally:
        torch.set_num_threads(threads)
    return together if together > BUSY * apart else apart


def _square_rate(device: torch.device, dtype: torch.dtype) -> float:
    """FLOP/s of square products with the threads that torch has."""
    rate, size = 0.0, MIN_ROWS
    while True:
        a, b = (_made_up(size, size, device=device, dtype=dtype) for _ in range(2))
        best = _shortest_product(a, b)
        rate = max(rate, 2 * size**3 / best)
        if 8 * best > MAX_MATMUL_SECONDS or size == MAX_ROWS:
            return rate
        size *= 2


def _own_products(
    device: torch.device, dtype: torch.dtype, model: GPTConfig, rows: int
) -> Iterator[tuple[torch.Tensor, torch.Tensor, int]]:
    """Two factors of each shape, and how many FLOPs of such products a step on `rows` tokens needs."""
    for n_in, n_out, layers in linear_layers(model):
        x, grad = _made_up(rows, n_in, device=device, dtype=dtype), _made_up(rows, n_out, device=device, dtype=dtype)
        weight = _made_up(n_out, n_in, device=device, dtype=dtype)
        for a, b in ((x, weight.T), (grad, weight), (grad.T, x)):  # forward; the gradients of input and weight
            yield a, b, layers * 2 * rows * n_in * n_out
    length, queries = model.block_size, min(model.block_size, MAX_QUERIES)
    q = _made_up(model.n_head, queries, model.head_dim, device=device, dtype=dtype)
    k = _made_up(model.n_head, length, model.head_dim, device=device, dtype=dtype)
    weights = _made_up(model.n_head, queries, length, device=device, dtype=dtype)
    # Scores and weights' gradients; outputs and queries' gradients; keys' and values' gradients. Half is in the future.
    for a, b in ((q, k.mT), (weights, k), (weights.mT, q)):
        yield a, b, 2 * model.n_layer * rows * length * model.n_head * model.head_dim


def _shortest_product(a: torch.Tensor, b: torch.Tensor) -> float:
    """Seconds of the shortest of many tries, after one that chooses kernels: other programs only ever slow one down."""
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


def _made_up(*size: int, device: torch.device, dtype: torch.dtype) -> torch.Tensor:
    """Random numbers, from a generator of their own: the run's must not notice.

    A GPU multiplies constants faster than it ever will a model's weights: fewer bits flip, and power is what bounds it
    (He 2024, "Strangely, Matrix Multiplications on GPUs Run Faster When Given 'Predictable' Data!").
    """
    generator = torch.Generator(device).manual_seed(0)
    return torch.empty(size, device=device, dtype=dtype).uniform_(-1, 1, generator=generator)


def _read(path: Path) -> float:
    """What is kept there; 0 where nothing is, or nothing sound."""
    try:
        peak = json.loads(path.read_text(encoding="utf-8"))["flops_per_second"]
    except (OSError, ValueError, KeyError, TypeError):
        return 0.0
    return float(peak) if isinstance(peak, (int, float)) and math.isfinite(peak) else 0.0


def _write(path: Path, record: dict[str, object]) -> None:
    """Keep a measurement, whole or not at all; it can be had again, so it need not survive a crash."""
    with contextlib.suppress(OSError):
        path.parent.mkdir(parents=True, exist_ok=True)
        descriptor, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.stem}-")
        with os.fdopen(descriptor, "w", encoding="utf-8") as file:
            json.dump(record, file)
        Path(temporary).replace(path)
