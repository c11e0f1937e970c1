"""Time to compile a model: with 24 layers at most 1.3x that with 12, because equal blocks share their compiled code.

    python -m benchmarks.compiling
    python -m benchmarks.compiling --layers 2 4 --repeats 1

Every measurement is a process of its own without cached code. Processor time is counted, not wall time: other programs
on the machine do not lengthen it.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
from functools import partial

from benchmarks.common import format_spread, format_verdict, run_interleaved

MAX_RATIO = 1.3
SEQUENCES = 2


def main() -> None:
    """Measure and print medians, or compile once and print the seconds."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, nargs=2, default=(12, 24))
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--compile", type=int, metavar="LAYERS", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.compile:
        print(json.dumps(measure_compilation(arguments.compile)))
        return
    runs = {f"{layers} layers": partial(measure_in_process, layers) for layers in arguments.layers}
    seconds = run_interleaved(runs, dict.fromkeys(runs, arguments.repeats))
    for name, values in seconds.items():
        print(f"{name}: {format_spread(values, ' s', 1)} of processor time")
    few, many = map(statistics.median, seconds.values())
    print(f"ratio {many / few:.2f}; {format_verdict(many / few, MAX_RATIO, at_least=False)}")


def measure_in_process(layers: int) -> float:
    """Return the processor seconds of `measure_compilation` in a new process."""
    program = [sys.executable, "-m", "benchmarks.compiling", "--compile", str(layers)]
    environment = os.environ | {"TORCHINDUCTOR_FORCE_DISABLE_CACHES": "1"}
    return float(json.loads(subprocess.run(program, env=environment, check=True, stdout=subprocess.PIPE).stdout))


def measure_compilation(layers: int) -> float:
    """Compile a model by its trial; return the processor seconds, those of the C++ compiler included."""
    import torch

    from gpt.auto_batch import trial_loss
    from gpt.configs.gpt_config import GPTConfig
    from gpt.configs.parallel_config import ParallelConfig
    from gpt.models.gpt import GPT
    from gpt.parallel.parallelize import compile_or_fall_back, parallelize
    from gpt.utils.distributed import DistContext

    model = GPT(GPTConfig(n_layer=layers, n_head=2, n_embd=64, block_size=64, vocab_size=256), seed=0)
    dist = DistContext("cpu")
    config = ParallelConfig()
    module = parallelize(model, model.h, dist, config, compile_mode="default", others=[model.loss])
    trial = partial(
        trial_loss,
        n_sequences=SEQUENCES,
        block_size=64,
        masked=False,
        device=dist.device,
        autocast=partial(torch.autocast, "cpu", enabled=False),
    )
    start = sum(os.times()[:4])
    if failure := compile_or_fall_back(model, module, trial, dist):
        raise SystemExit(failure)
    return sum(os.times()[:4]) - start


if __name__ == "__main__":
    main()
