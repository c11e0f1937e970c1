"""How fast the data loader is: alone, and as a share of a training step.

    python -m benchmarks.loader
    python -m benchmarks.loader --tokens 1000000000 --skip-training

Alone: `DataLoader.get_batch` in a loop over a corpus of random tokens, that other work does not hide it. Every pass
opens the corpus anew; the first pass over its tokens verifies each block of them, the second finds them verified. Of a
large corpus a run sees few windows twice in the same block: that is the beginning of the first pass.

In training: a run of the preset `shakespeare-char` on a made-up text, in which the time that the loop waits in
`get_batch` is set against the time from step to step.
"""

import argparse
import statistics
import string
import tempfile
import time
from pathlib import Path

import numpy as np
import torch

from benchmarks.common import spread, verdict, write_manifest
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
LEAST_TOKENS_PER_SECOND = 50e6
MOST_SHARE = 0.5
"""Percent of a step."""


def main() -> None:
    """Print tokens per second of the loader alone, and its share of a step."""
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--tokens", type=int, default=100_000_000, help="of the made-up corpus")
    arguments.add_argument("--batch", type=int, default=16, help="sequences of a step of the loader alone")
    arguments.add_argument("--repeats", type=int, default=5)
    arguments.add_argument("--steps", type=int, default=300, help="of training")
    arguments.add_argument("--skip-training", action="store_true")
    given = arguments.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        _alone(folder, given.tokens, given.batch, given.repeats)
        if not given.skip_training:
            _in_training(folder, given.steps)


def _alone(folder: Path, n_tokens: int, batch_size: int, repeats: int) -> None:
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
        kept = verdict(statistics.median(values), LEAST_TOKENS_PER_SECOND / 1e6, at_least=True)
        print(f"  {name:28} {spread(values, ' M tokens/s', 1):40} {kept}")


def _write_corpus(folder: Path, n_tokens: int) -> None:
    """Random tokens in documents of a thousand."""
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


def _in_training(folder: Path, steps: int) -> None:
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
    begins, waits = [], []
    get_batch = DataLoader.get_batch

    def timed(loader: DataLoader, step: int) -> object:
        begins.append(time.perf_counter())
        batch = get_batch(loader, step)
        waits.append(time.perf_counter() - begins[-1])
        return batch

    DataLoader.get_batch = timed
    try:
        build_trainer(open_run(config)).train()
    finally:
        DataLoader.get_batch = get_batch
    warm = slice(min(20, steps // 2), None)
    step_seconds = np.diff(begins)[warm]
    wait, step = statistics.median(waits[warm]), statistics.median(step_seconds)
    share = 100 * wait / step
    print(f"shakespeare-char, {steps} steps: {1e6 * wait:.0f} us of waiting in a step of {1e3 * step:.2f} ms (medians)")
    print(f"  share of a step              {share:.3f}%  {verdict(share, MOST_SHARE, at_least=False)}")
    print(f"  of all the time              {100 * sum(waits[warm][:-1]) / step_seconds.sum():.3f}%")


if __name__ == "__main__":
    main()
