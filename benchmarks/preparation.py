"""Speed of `gpt prepare` with GPT-2's tokenizer, compared with the usual scripts for it.

    python -m benchmarks.preparation --megabytes 100
    python -m benchmarks.preparation --megabytes 100 --format text

Each contender is a program that starts, reads the input, writes the tokens and ends; all of that is measured. They
alternate, and medians are compared. The slowest one gets the beginning of the input, and its seconds are scaled by the
bytes. On a busy machine, look at the CPU time of all processes as well.
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

from benchmarks.common import Cost, format_verdict, measure_program, run_interleaved, write_input
from gpt.data.manifest import read_corpus_manifest
from gpt.data.shards import TokenStream
from gpt.data.tokenizer import TOKENIZER_FILE
from gpt.data.tokenizer_builders import build_gpt2_tokenizer

OURS = "gpt prepare"
UNSPLIT = "gpt prepare --val-fraction 0"
TIKTOKEN = "tiktoken, a loop"
DATASETS = "datasets, num_proc=2"
TOKENIZERS = "tokenizers, a loop"
MIN_RATIOS = {TIKTOKEN: 1.8, DATASETS: 3.0, TOKENIZERS: 5.0}
"""Contender -> required ratio of its seconds to those of `gpt prepare`."""


def main() -> None:
    """Measure, check that all contenders wrote the same tokens, and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--megabytes", type=float, default=100, help="size of the input")
    parser.add_argument("--slow-megabytes", type=float, default=20, help="size of the input of the tokenizers loop")
    parser.add_argument("--format", choices=("jsonl", "text"), default="jsonl")
    parser.add_argument("--workers", type=int, default=2, help="processes of gpt prepare")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--slow-repeats", type=int, default=2, help="repeats of datasets and tokenizers")
    arguments = parser.parse_args()

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        suffix = ".jsonl" if arguments.format == "jsonl" else ".txt"
        source, small_source = folder / f"source{suffix}", folder / f"small_source{suffix}"
        size = write_input(source, int(arguments.megabytes * 1e6), arguments.format)
        scale = size / write_input(
            small_source, int(min(arguments.slow_megabytes, arguments.megabytes) * 1e6), arguments.format
        )
        (folder / TOKENIZER_FILE).write_text(build_gpt2_tokenizer().definition, encoding="utf-8")

        flags = ["--workers", str(arguments.workers)]
        contenders: dict[str, Callable[[], Cost]] = {
            OURS: partial(_run_ours, source, folder / OURS, flags),
            UNSPLIT: partial(_run_ours, source, folder / UNSPLIT, [*flags, "--val-fraction", "0"]),
            TIKTOKEN: partial(_run_peer, "tiktoken", source, folder / TIKTOKEN),
            DATASETS: partial(_run_peer, "datasets", source, folder / DATASETS),
            TOKENIZERS: partial(_run_peer, "tokenizers", small_source, folder / TOKENIZERS, scale),
        }
        slow = (DATASETS, TOKENIZERS)
        repeats = {name: arguments.slow_repeats if name in slow else arguments.repeats for name in contenders}
        costs = run_interleaved(contenders, repeats)

        tokens = _count_tokens_of_corpus(folder / UNSPLIT)
        different = [
            name for name in (TIKTOKEN, DATASETS) if not np.array_equal(_count_tokens_of_files(folder / name), tokens)
        ]

    print(f"{size / 1e6:.0f} MB of {arguments.format}, {tokens.sum():,} tokens")
    print(f"{'':28} {'median':>8} {'min':>8} {'max':>8} {'runs':>5} {'CPU':>8} {'MB/s':>6} {'ratio':>6}")
    ours = statistics.median(cost.seconds for cost in costs[OURS])
    for name, values in costs.items():
        seconds = [cost.seconds for cost in values]
        middle, cpu = statistics.median(seconds), statistics.median(cost.cpu_seconds for cost in values)
        row = f"{name:28} {middle:7.2f}s {min(seconds):7.2f}s {max(seconds):7.2f}s {len(values):5} {cpu:7.2f}s"
        row += f" {size / 1e6 / middle:6.1f} {middle / ours:5.2f}x"
        print(row, f" {format_verdict(middle / ours, MIN_RATIOS[name], at_least=True)}" if name in MIN_RATIOS else "")
    print(f"{TOKENIZERS} got 1/{scale:.1f} of the input; its seconds are scaled by the bytes")
    if different:
        raise SystemExit(f"NOT THE SAME TOKENS: {', '.join(different)} differ from {UNSPLIT}")
    print("all contenders wrote the same tokens, each the same number of times")


def _run_ours(source: Path, out: Path, flags: list[str]) -> Cost:
    shutil.rmtree(out, ignore_errors=True)
    command = [sys.executable, "-m", "gpt.main", "prepare", source, "--tokenizer", "gpt2", "--out", out]
    return measure_program([*command, *flags])


def _run_peer(name: str, source: Path, out: Path, scale: float = 1.0) -> Cost:
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir()
    shutil.copy(out.parent / TOKENIZER_FILE, out)
    with tempfile.TemporaryDirectory(dir=out.parent) as cache:  # otherwise `datasets` would find its earlier result
        env = os.environ | {"HF_HOME": cache, "HF_HUB_OFFLINE": "1"}
        cost = measure_program(
            [sys.executable, Path(__file__).with_name("tokenizing_peers.py"), name, source, out], env
        )
    return Cost(scale * cost.seconds, scale * cost.cpu_seconds)


def _count_tokens_of_corpus(folder: Path) -> np.ndarray:
    manifest = read_corpus_manifest(folder)
    shards = [(folder, shard) for shard in manifest.shards]
    stream = TokenStream(shards, manifest.vocab_size)
    return np.bincount(stream.read(0, len(stream)), minlength=manifest.vocab_size)


def _count_tokens_of_files(folder: Path) -> np.ndarray:
    return sum(np.bincount(np.fromfile(path, dtype=np.uint16), minlength=50257) for path in folder.glob("*.bin"))


if __name__ == "__main__":
    main()
