"""Generation against transformers' generate: the same weights, greedy, in one interleaved run.

    python -m benchmarks.generation                    # 124M and 10M parameters, batch 1 and 8, prompts of 16 and 512
    python -m benchmarks.generation --sizes 124m --batches 1 --prompts 16 --repeats 7

Prints the time of a new token and the ratio of medians. Both generate the same number of tokens after the same prompts,
which are not text: only time is compared. Needs transformers (extra `bench`).
"""

import argparse
import statistics
import time
from collections.abc import Callable, Sequence

import torch
from transformers import GPT2Config, GPT2LMHeadModel

from benchmarks.common import format_spread, format_verdict, run_interleaved
from gpt.configs.gpt_config import GPTConfig
from gpt.configs.observer_config import SampleConfig
from gpt.inference.bfloat16 import round_weights_to_bfloat16
from gpt.inference.generate import Completion, generate
from gpt.machine.spinning import sleep_when_busy
from gpt.models.gpt import GPT

SIZES = {
    "124m": {"n_layer": 12, "n_head": 12, "n_embd": 768, "vocab_size": 50257},
    "10m": {"n_layer": 6, "n_head": 6, "n_embd": 384, "vocab_size": 257},
}
BLOCK_SIZE = 1024
GOAL = 2.0
"""Ratio to reach with 124M parameters in bfloat16 at batch 1."""


def build_models(size: str, dtype: torch.dtype) -> tuple[GPT, GPT2LMHeadModel]:
    """Return a GPT-2 here and in transformers, with the same weights."""
    ours = GPT(GPTConfig(block_size=BLOCK_SIZE, **SIZES[size]), seed=0).eval()
    theirs = GPT2LMHeadModel(
        GPT2Config(n_positions=BLOCK_SIZE, **SIZES[size], bos_token_id=None, eos_token_id=None)
    ).eval()
    weights = dict(ours.named_parameters())
    with torch.no_grad():
        for name, parameter in theirs.named_parameters():
            weight = weights[name.removeprefix("transformer.")]
            parameter.copy_(weight.t() if ".c_" in name and name.endswith("weight") else weight)
    theirs = theirs.to(dtype)
    if dtype == torch.bfloat16:
        round_weights_to_bfloat16(ours)
    return ours, theirs


def build_contenders(
    ours: GPT, theirs: GPT2LMHeadModel, dtype: torch.dtype, prompts: list[list[int]], n_new: int
) -> dict[str, Callable[[], float]]:
    """Return a function of each program that generates once and returns the seconds per new token of a text."""
    ids = torch.tensor(prompts)
    config, vocab_size = SampleConfig(max_new_tokens=n_new, temperature=0), ours.config.vocab_size

    def run_ours() -> float:
        start = time.perf_counter()
        completions = [Completion(prompt, config, seed=0) for prompt in prompts]
        for _ in generate(ours, ours.config, completions, vocab_size=vocab_size, end_of_text=None, dtype=dtype):
            pass
        return (time.perf_counter() - start) / n_new

    def run_theirs() -> float:
        start = time.perf_counter()
        theirs.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=n_new,
            min_new_tokens=n_new,
            do_sample=False,
            pad_token_id=0,
        )
        return (time.perf_counter() - start) / n_new

    return {"gpt": run_ours, "transformers": run_theirs}


def main(argv: Sequence[str] | None = None) -> int:
    """Measure every combination and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", nargs="+", default=[*SIZES], choices=[*SIZES])
    parser.add_argument("--dtype", default="bfloat16", choices=["bfloat16", "float32"])
    parser.add_argument("--batches", nargs="+", type=int, default=[1, 8])
    parser.add_argument("--prompts", nargs="+", type=int, default=[16, 512], help="tokens of each prompt")
    parser.add_argument("--new-tokens", type=int, default=32)
    parser.add_argument("--repeats", type=int, default=5)
    options = parser.parse_args(argv)
    dtype = getattr(torch, options.dtype)
    sleep_when_busy(torch.get_num_threads())  # as in every program here; it helps both
    print(f"{options.dtype}, {torch.get_num_threads()} threads, {options.new_tokens} new tokens; ms per new token")
    for size in options.sizes:
        ours, theirs = build_models(size, dtype)
        for batch in options.batches:
            for length in options.prompts:
                prompts = [[(31 * i + 7 * row) % 257 for i in range(length)] for row in range(batch)]
                contenders = build_contenders(ours, theirs, dtype, prompts, options.new_tokens)
                run_interleaved(contenders, dict.fromkeys(contenders, 1))  # warm up
                seconds = run_interleaved(contenders, dict.fromkeys(contenders, options.repeats))
                shown = {name: format_spread([1e3 * value for value in values]) for name, values in seconds.items()}
                ratio = statistics.median(seconds["transformers"]) / statistics.median(seconds["gpt"])
                has_goal = (size, batch, options.dtype) == ("124m", 1, "bfloat16")
                verdict = f"  {format_verdict(ratio, GOAL, at_least=True)}" if has_goal else ""
                print(f"{size} batch {batch} prompt {length}: {shown}  {ratio:.2f}x{verdict}", flush=True)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
