"""Generation against transformers' generate and llama.cpp: the same weights, greedy, in one interleaved run.

    python -m benchmarks.generation                    # 124M and 10M parameters, batch 1 and 8, prompts of 16 and 512
    python -m benchmarks.generation --sizes 124m --batches 1 --prompts 16 --repeats 7

Prints the time of a new token, prompt included, against transformers, and prefill and decode apart against llama.cpp,
with the ratios of medians. All generate the same number of tokens after the same prompts, which are not text: only time
is compared. Needs transformers (extra `bench`) and, for its part, llama-cpp-python (extra `llama-cpp`).
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import GPT2Config, GPT2LMHeadModel

from benchmarks.common import format_spread, format_verdict, run_interleaved
from gpt.configs.gpt_config import GPTConfig
from gpt.configs.observer_config import SampleConfig
from gpt.data.tokenizer_builders import build_byte_tokenizer
from gpt.inference.bfloat16 import round_weights_to_bfloat16
from gpt.inference.generate import Batch, Completion
from gpt.interop import llama_cpp_runtime
from gpt.interop.gguf import TYPES, write_gguf
from gpt.machine.spinning import sleep_when_busy
from gpt.models.gpt import GPT

SIZES = {
    "124m": {"n_layer": 12, "n_head": 12, "n_embd": 768, "vocab_size": 50257},
    "10m": {"n_layer": 6, "n_head": 6, "n_embd": 384, "vocab_size": 257},
}
BLOCK_SIZE = 1024
TRANSFORMERS_GOAL = 2.0
"""Ratio to reach with 124M parameters in bfloat16 at batch 1."""
LLAMA_CPP_GOAL = 0.8
"""Ratio to reach in the same type."""


@dataclass(frozen=True)
class Measurement:
    """Seconds of one generation."""

    total: float
    prefill: float
    """Until the first new token of each row; 0 where the program does not separate them."""
    n_new: int

    @property
    def per_token(self) -> float:
        """Seconds for each new token of a row, prompt included."""
        return self.total / self.n_new

    @property
    def decode(self) -> float:
        """Seconds for each new token of a row after the first."""
        return (self.total - self.prefill) / (self.n_new - 1)


Contender = Callable[[Sequence[Sequence[int]], int], Measurement]
"""Generates once after prompts of one length: (prompts, new tokens)."""


@contextmanager
def build_contenders(size: str, dtype: torch.dtype, gguf_types: Sequence[str]) -> Iterator[dict[str, Contender]]:
    """Yield the programs by their names, with the same weights."""
    ours = GPT(GPTConfig(block_size=BLOCK_SIZE, **SIZES[size]), seed=0).eval()
    contenders: dict[str, Contender] = {"transformers": build_transformers(ours, dtype)}
    with tempfile.TemporaryDirectory() as folder:
        processes = []
        for kind in gguf_types:
            path = Path(folder) / f"{kind}.gguf"
            write_gguf(path, ours.state_dict(), ours.config, build_byte_tokenizer(), dtype=kind)
            processes.append(start_llama_cpp(path))
            contenders[f"llama.cpp {TYPES[kind]}"] = build_llama_cpp(processes[-1])
        if dtype == torch.bfloat16:
            round_weights_to_bfloat16(ours)
        try:
            yield {"gpt": build_gpt(ours, dtype), **contenders}
        finally:
            for process in processes:
                process.kill()
                process.communicate()


def build_gpt(model: GPT, dtype: torch.dtype) -> Contender:
    """Return this program."""

    def run(prompts: Sequence[Sequence[int]], n_new: int) -> Measurement:
        completions = [
            Completion(prompt, SampleConfig(max_new_tokens=n_new, temperature=0), seed=0) for prompt in prompts
        ]
        start = time.perf_counter()
        batch = Batch(
            model,
            model.config,
            vocab_size=model.config.vocab_size,
            end_of_text=None,
            max_rows=len(prompts),
            capacity=len(prompts[0]) + n_new,
            dtype=dtype,
        )
        batch.add(completions)
        prefill = time.perf_counter() - start
        while batch:
            batch.step()
        return Measurement(time.perf_counter() - start, prefill, n_new)

    return run


def build_transformers(ours: GPT, dtype: torch.dtype) -> Contender:
    """Return transformers' generate with the same weights."""
    sizes = {name: getattr(ours.config, name) for name in ("n_layer", "n_head", "n_embd", "vocab_size")}
    model = GPT2LMHeadModel(GPT2Config(n_positions=BLOCK_SIZE, **sizes, bos_token_id=None, eos_token_id=None)).eval()
    weights = dict(ours.named_parameters())
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            weight = weights[name.removeprefix("transformer.")]
            parameter.copy_(weight.t() if ".c_" in name and name.endswith("weight") else weight)
    model = model.to(dtype)

    def run(prompts: Sequence[Sequence[int]], n_new: int) -> Measurement:
        ids = torch.tensor(prompts)
        start = time.perf_counter()
        model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=n_new,
            min_new_tokens=n_new,
            do_sample=False,
            pad_token_id=0,
        )
        return Measurement(time.perf_counter() - start, 0.0, n_new)

    return run


def start_llama_cpp(path: Path) -> "subprocess.Popen[str]":
    """Start a process that generates by llama.cpp."""
    arguments = [str(path), str(torch.get_num_threads()), str(8 * BLOCK_SIZE)]
    command = [sys.executable, "-m", "benchmarks.llama_cpp_generation", *arguments]
    return subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    )


def build_llama_cpp(process: "subprocess.Popen[str]") -> Contender:
    """Return llama.cpp in a process."""

    def run(prompts: Sequence[Sequence[int]], n_new: int) -> Measurement:
        assert process.stdin is not None and process.stdout is not None
        process.stdin.write(json.dumps({"prompts": prompts, "n_new": n_new}) + "\n")
        process.stdin.flush()
        prefill, total = json.loads(process.stdout.readline())
        return Measurement(total, prefill, n_new)

    return run


def format_comparison(measurements: dict[str, list[Measurement]], *, has_goal: bool, gguf_type: str) -> Iterator[str]:
    """Yield a line for each other program and part: times, ratio of medians, verdict."""
    for name in [name for name in measurements if name != "gpt"]:
        is_llama = name.startswith("llama.cpp")
        for part in ("prefill", "decode") if is_llama else ("per_token",):
            seconds = {key: [getattr(item, part) for item in measurements[key]] for key in ("gpt", name)}
            ratio = statistics.median(seconds[name]) / statistics.median(seconds["gpt"])
            shown = ", ".join(f"{key} {format_spread([1e3 * value for value in seconds[key]])}" for key in seconds)
            goal = LLAMA_CPP_GOAL if is_llama else TRANSFORMERS_GOAL
            is_judged = name == f"llama.cpp {gguf_type}" if is_llama else has_goal
            verdict = f"  {format_verdict(ratio, goal, at_least=True)}" if is_judged else ""
            yield f"  {part.replace('_', ' ')}: {shown}  {ratio:.2f}x{verdict}"


def main(argv: Sequence[str] | None = None) -> int:
    """Measure every combination and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", nargs="+", default=[*SIZES], choices=[*SIZES])
    parser.add_argument("--dtype", default="bfloat16", choices=["bfloat16", "float32"])
    parser.add_argument("--gguf-types", nargs="*", choices=[*TYPES], help="files for llama.cpp; default: --dtype")
    parser.add_argument("--batches", nargs="+", type=int, default=[1, 8])
    parser.add_argument("--prompts", nargs="+", type=int, default=[16, 512], help="tokens of each prompt")
    parser.add_argument("--new-tokens", type=int, default=32)
    parser.add_argument("--repeats", type=int, default=5)
    options = parser.parse_args(argv)
    dtype = getattr(torch, options.dtype)
    gguf_types = [options.dtype] if options.gguf_types is None else options.gguf_types
    if not llama_cpp_runtime.is_installed():
        print("without llama.cpp: llama-cpp-python is not installed")
        gguf_types = []
    sleep_when_busy(torch.get_num_threads())  # as in every program here; it helps both
    print(f"{options.dtype}, {torch.get_num_threads()} threads, {options.new_tokens} new tokens; milliseconds")
    for size in options.sizes:
        with build_contenders(size, dtype, gguf_types) as contenders:
            for batch in options.batches:
                for length in options.prompts:
                    prompts = [[(31 * i + 7 * row) % 257 for i in range(length)] for row in range(batch)]
                    runs = {
                        name: lambda run=run, prompts=prompts: run(prompts, options.new_tokens)
                        for name, run in contenders.items()
                    }
                    run_interleaved(runs, dict.fromkeys(runs, 1))  # warm up
                    measurements = run_interleaved(runs, dict.fromkeys(runs, options.repeats))
                    print(f"{size} batch {batch} prompt {length}")
                    has_goal = (size, batch, options.dtype) == ("124m", 1, "bfloat16")
                    lines = format_comparison(measurements, has_goal=has_goal, gguf_type=TYPES[options.dtype])
                    print(*lines, sep="\n", flush=True)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
