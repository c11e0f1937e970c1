"""How fast `gpt prepare` makes GPT-2's tokens, beside the scripts that people write for it.

    python -m benchmarks.preparation --megabytes 100
    python -m benchmarks.preparation --megabytes 100 --format text

Each contender is a program of its own that starts, reads the input, writes the tokens and ends; all of that is
measured. They take turns, and what is compared are medians. The slowest works on the beginning of the input, and its
seconds are scaled by the bytes. Where the machine has other work to do, look at the CPU time of all processes, too.
"""

import argparse
import os
import shutil
import statistics
import sys
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np

from benchmarks.common import Cost, cost_of, interleaved, verdict, write_input
from gpt.data.manifest import TOKENIZER_FILE, read_corpus_manifest
from gpt.data.shards import TokenStream
from gpt.data.tokenizer_builders import build_gpt2_tokenizer

OURS = "gpt prepare"
UNSPLIT = "gpt prepare --val-fraction 0"
TIKTOKEN = "tiktoken, a loop"
DATASETS = "datasets, num_proc=2"
TOKENIZERS = "tokenizers, a loop"
REQUIRED = {TIKTOKEN: 1.8, DATASETS: 3.0, TOKENIZERS: 5.0}
"""How many times the seconds of `gpt prepare` each needs at least."""


def main() -> None:
    """Measure, check that all made the same tokens, print a table."""
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--megabytes", type=float, default=100, help="of the input")
    arguments.add_argument("--slow-megabytes", type=float, default=20, help="of what the tokenizers loop is given")
    arguments.add_argument("--format", choices=("jsonl", "text"), default="jsonl")
    arguments.add_argument("--workers", type=int, default=2, help="processes of gpt prepare")
    arguments.add_argument("--repeats", type=int, default=5)
    arguments.add_argument("--slow-repeats", type=int, default=2, help="of datasets and tokenizers")
    given = arguments.parse_args()

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        suffix = ".jsonl" if given.format == "jsonl" else ".txt"
        whole, slice_ = folder / f"whole{suffix}", folder / f"slice{suffix}"
        size = write_input(whole, int(given.megabytes * 1e6), given.format)
        scale = size / write_input(slice_, int(min(given.slow_megabytes, given.megabytes) * 1e6), given.format)
        (folder / TOKENIZER_FILE).write_text(build_gpt2_tokenizer().definition, encoding="utf-8")

        flags = ["--workers", str(given.workers)]
        contenders: dict[str, Callable[[], Cost]] = {
            OURS: partial(_ours, whole, folder / OURS, flags),
            UNSPLIT: partial(_ours, whole, folder / UNSPLIT, [*flags, "--val-fraction", "0"]),
            TIKTOKEN: partial(_peer, "tiktoken", whole, folder / TIKTOKEN),
            DATASETS: partial(_peer, "datasets", whole, folder / DATASETS),
            TOKENIZERS: partial(_peer, "tokenizers", slice_, folder / TOKENIZERS, scale),
        }
        slow = (DATASETS, TOKENIZERS)
        repeats = {name: given.slow_repeats if name in slow else given.repeats for name in contenders}
        costs = interleaved(contenders, repeats)

        tokens = _counts_of_corpus(folder / UNSPLIT)
        others = [name for name in (TIKTOKEN, DATASETS) if not np.array_equal(_counts_of_files(folder / name), tokens)]

    print(f"{size / 1e6:.0f} MB of {given.format}, {tokens.sum():,} tokens")
    print(f"{'':28} {'median':>8} {'min':>8} {'max':>8} {'runs':>5} {'CPU':>8} {'MB/s':>6} {'ratio':>6}")
    ours = statistics.median(cost.seconds for cost in costs[OURS])
    for name, values in costs.items():
        seconds = [cost.seconds for cost in values]
        middle, cpu = statistics.median(seconds), statistics.median(cost.cpu_seconds for cost in values)
        row = f"{name:28} {middle:7.2f}s {min(seconds):7.2f}s {max(seconds):7.2f}s {len(values):5} {cpu:7.2f}s"
        row += f" {size / 1e6 / middle:6.1f} {middle / ours:5.2f}x"
        print(row, f" {verdict(middle / ours, REQUIRED[name], at_least=True)}" if name in REQUIRED else "")
    print(f"{TOKENIZERS} worked on 1/{scale:.1f} of the input; its seconds are scaled by the bytes")
    if others:
        raise SystemExit(f"NOT THE SAME TOKENS: {', '.join(others)} beside {UNSPLIT}")
    print("the others made the same tokens, each as often")


def _ours(source: Path, out: Path, flags: list[str]) -> Cost:
    shutil.rmtree(out, ignore_errors=True)
    command = [sys.executable, "-m", "gpt.main", "prepare", source, "--tokenizer", "gpt2", "--out", out]
    return cost_of([*command, *flags])


def _peer(name: str, source: Path, out: Path, scale: float = 1.0) -> Cost:
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir()
    shutil.copy(out.parent / TOKENIZER_FILE, out)
    with tempfile.TemporaryDirectory(dir=out.parent) as cache:  # or `datasets` would find what it did before
        env = os.environ | {"HF_HOME": cache, "HF_HUB_OFFLINE": "1"}
        cost = cost_of([sys.executable, Path(__file__).with_name("tokenizing_peers.py"), name, source, out], env)
    return Cost(scale * cost.seconds, scale * cost.cpu_seconds)


def _counts_of_corpus(folder: Path) -> np.ndarray:
    manifest = read_corpus_manifest(folder)
    shards = [(folder, shard) for source in manifest.sources for shard in (*source.train, *source.val)]
    stream = TokenStream(shards, manifest.vocab_size)
    return np.bincount(stream.read(0, len(stream)), minlength=manifest.vocab_size)


def _counts_of_files(folder: Path) -> np.ndarray:
    return sum(np.bincount(np.fromfile(path, dtype=np.uint16), minlength=50257) for path in folder.glob("*.bin"))


if __name__ == "__main__":
    main()
