"""Speed of the data loader: alone, and as a share of a training step.

    python -m benchmarks.loader
    python -m benchmarks.loader --tokens 1000000000 --skip-training

Alone: `DataLoader.get_batch` in a loop over a corpus of random tokens, with no other work to hide it. Every repeat
opens the corpus again. Its first pass over the tokens verifies each block, the second finds all blocks verified. A run
on a large corpus rarely reads two windows of the same block, as at the beginning of the first pass.

In training: a run of the preset `shakespeare-char` on a synthetic text. The time that the loop waits in `get_batch` is
compared with the time from step to step.
"""

import argparse
import statistics
import string
import tempfile
import time
from pathlib import Path

import numpy as np
import torch

from benchmarks.common import format_spread, format_verdict, write_manifest
from gpt.configs.batch_plan import BatchPlan
from gpt.configs.data_config import DataConfig
from gpt.configs.observer_config import EvalConfig, LogConfig
from gpt.configs.presets import PRESETS
from gpt.data.corpus import build_sequences, open_corpus
from gpt.data.data_loader import DataLoader
from gpt.data.shards import ShardWriter
from gpt.pipeline import build_trainer
from gpt.run import open_run

BLOCK_SIZE = 1024
VOCAB_SIZE = 257
MIN_TOKENS_PER_SECOND = 50e6
MAX_STEP_PERCENT = 0.5


def main() -> None:
    """Measure the loader alone and in training, and print both."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=100_000_000, help="tokens of the synthetic corpus")
    parser.add_argument("--batch", type=int, default=16, help="sequences per step of the loader alone")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--steps", type=int, default=300, help="training steps")
    parser.add_argument("--skip-training", action="store_true")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        _measure_alone(folder, arguments.tokens, arguments.batch, arguments.repeats)
        if not arguments.skip_training:
            _measure_in_training(folder, arguments.steps)


def _measure_alone(folder: Path, n_tokens: int, batch_size: int, repeats: int) -> None:
    _write_corpus(folder, n_tokens)
    steps = (n_tokens // BLOCK_SIZE - 1) // batch_size
    beginning = max(1, steps // 20)
    rates: dict[str, list[float]] = {"beginning of the first pass": [], "first pass": [], "second pass": []}
    for _ in range(repeats):
        with _open(folder, batch_size) as loader:
            start = time.perf_counter()
            _read(loader, 0, beginning)
            begun = time.perf_counter()
            _read(loader, beginning, steps)
            first = time.perf_counter()
            _read(loader, steps, 2 * steps)
            second = time.perf_counter()
        for name, count, seconds in zip(
            rates, (beginning, steps, steps), (begun - start, first - start, second - first), strict=True
        ):
            rates[name].append(count * batch_size * BLOCK_SIZE / seconds / 1e6)
    print(f"the loader alone: {n_tokens:,} tokens, {batch_size} sequences of {BLOCK_SIZE} a step")
    for name, values in rates.items():
        verdict = format_verdict(statistics.median(values), MIN_TOKENS_PER_SECOND / 1e6, at_least=True)
        print(f"  {name:28} {format_spread(values, ' M tokens/s', 1):40} {verdict}")


def _write_corpus(folder: Path, n_tokens: int) -> None:
    """Write a corpus of random tokens in documents of 1,000."""
    generator = np.random.default_rng(0)
    with ShardWriter(folder / "train-000000.safetensors", VOCAB_SIZE) as writer:
        for start in range(0, n_tokens, 1000):
            length = min(1000, n_tokens - start)
            writer.add(generator.integers(0, VOCAB_SIZE, length, dtype=np.uint16), length)
        shard = writer.finish()
    assert shard is not None
    write_manifest(folder, [shard])


def _open(folder: Path, batch_size: int) -> DataLoader:
    config = DataConfig(source=(str(folder),))
    sequences = build_sequences(open_corpus([folder], config, BLOCK_SIZE), config, BLOCK_SIZE, seed=0)
    batch = BatchPlan(micro_batch_size=batch_size, block_size=BLOCK_SIZE, world_size=1, grad_accum_steps=1)
    return DataLoader(sequences, batch, rank=0, device=torch.device("cpu"))


def _read(loader: DataLoader, first: int, stop: int) -> None:
    for step in range(first, stop):
        loader.get_batch(step)


def _measure_in_training(folder: Path, steps: int) -> None:
    text = folder / "text.txt"
    letters = np.frombuffer((string.ascii_letters + " \n").encode(), dtype=np.uint8)
    text.write_bytes(np.random.default_rng(0).choice(letters, 1_000_000).tobytes())
    preset = PRESETS["shakespeare-char"]()
    config = preset.model_copy(
        update={
            "run_dir": folder / "run",
            "max_steps": steps,
            "data": preset.data.model_copy(update={"source": (str(text),), "cache_dir": folder / "cache"}),
            "log": LogConfig(interval=steps),
            "eval": EvalConfig(interval=0),
        }
    )
    starts, waits = [], []
    get_batch = DataLoader.get_batch

    def timed_get_batch(loader: DataLoader, step: int) -> object:
        starts.append(time.perf_counter())
        batch = get_batch(loader, step)
        waits.append(time.perf_counter() - starts[-1])
        return batch

    DataLoader.get_batch = timed_get_batch
    try:
        build_trainer(open_run(config)).train()
    finally:
        DataLoader.get_batch = get_batch
    after_warmup = slice(min(20, steps // 2), None)
    step_seconds = np.diff(starts)[after_warmup]
    wait, step = statistics.median(waits[after_warmup]), statistics.median(step_seconds)
    share = 100 * wait / step
    print(f"shakespeare-char, {steps} steps: {1e6 * wait:.0f} us of waiting in a step of {1e3 * step:.2f} ms (medians)")
    print(f"  share of a step              {share:.3f}%  {format_verdict(share, MAX_STEP_PERCENT, at_least=False)}")
    print(f"  share of the whole run       {100 * sum(waits[after_warmup][:-1]) / step_seconds.sum():.3f}%")


if __name__ == "__main__":
    main()
