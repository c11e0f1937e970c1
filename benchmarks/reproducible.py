"""Cost of `--parallel.reproducible`: steps of two processes that add gradients in a fixed order, compared with DDP.

    python -m benchmarks.reproducible
    python -m benchmarks.reproducible --preset speedrun-char --micro-batches 2 --processes 4

Both are measured in the same processes, alternating step by step, on synthetic tokens, with one thread per process.
"""

import argparse
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial

import torch

from benchmarks.common import build_step_function, format_spread, run_interleaved
from gpt.configs.presets import PRESETS
from gpt.utils.distributed import DistContext

DDP, TREE = "DDP", "--parallel.reproducible"
WARMUP_STEPS = 3


def main() -> None:
    """Start the processes, or measure in one of them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", choices=PRESETS, default="quickstart")
    parser.add_argument(
        "--micro-batches", type=int, default=4, help="micro-batches per step and process; a power of two"
    )
    parser.add_argument("--processes", type=int, default=2, help="a power of two")
    parser.add_argument("--repeats", type=int, default=20)
    parser.add_argument("--measure", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.measure:
        _measure(arguments.preset, arguments.micro_batches, arguments.repeats)
        return
    launcher = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        f"--nproc-per-node={arguments.processes}",
    ]
    command = [*launcher, "-m", "benchmarks.reproducible", *sys.argv[1:], "--measure"]
    subprocess.run(command, env=os.environ | {"OMP_NUM_THREADS": "1"}, check=True)


def _measure(preset: str, micro_batches: int, repeats: int) -> None:
    torch.set_num_threads(1)
    dist = DistContext("cpu")
    step_functions = {
        name: _build_step_function(preset, micro_batches, dist, reproducible=name == TREE) for name in (DDP, TREE)
    }
    for step_function in step_functions.values():
        for _ in range(WARMUP_STEPS):
            step_function()
    seconds = run_interleaved(
        {name: partial(_time, step_function, dist) for name, step_function in step_functions.items()},
        dict.fromkeys(step_functions, repeats),
    )
    if dist.is_main:
        print(f"{preset}, {dist.world_size} processes of one thread, {micro_batches} micro-batches each in a step")
        for name, values in seconds.items():
            print(f"  {name:26} {format_spread([1e3 * value for value in values], ' ms', 1)}")
        ratios = [tree / ddp for ddp, tree in zip(seconds[DDP], seconds[TREE], strict=True)]
        medians = statistics.median(seconds[TREE]) / statistics.median(seconds[DDP])
        print(f"  {'ratio of the medians':26} {medians:.3f}\n  {'ratios, step by step':26} {format_spread(ratios)}")
    dist.close()


def _build_step_function(
    preset: str, micro_batches: int, dist: DistContext, *, reproducible: bool
) -> Callable[[], None]:
    """Return a function that takes the next step of a run of the preset."""
    config = PRESETS[preset]().on_device("cpu")
    size, block_size = config.micro_batch_size, config.model.block_size
    assert isinstance(size, int), "presets set a number"
    parallel = config.parallel.model_copy(update={"reproducible": reproducible})
    tokens_per_step = size * block_size * micro_batches * dist.world_size
    config = config.model_copy(update={"parallel": parallel, "tokens_per_step": tokens_per_step, "dtype": "float32"})
    return build_step_function(config, dist)


def _time(step_function: Callable[[], None], dist: DistContext) -> float:
    """Return the seconds of a step between two barriers."""
    dist.min(0)
    start = time.perf_counter()
    step_function()
    dist.min(0)
    return time.perf_counter() - start


if __name__ == "__main__":
    main()
