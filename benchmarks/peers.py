"""Training speed and memory compared with other GPT trainers: one model, one batch, one machine, alternating.

    pip install -e '.[bench]'
    git clone https://github.com/karpathy/nanoGPT
    python -m benchmarks.peers --model 10m --nanogpt nanoGPT --json 10m.json
    python -m benchmarks.peers --model 124m --nanogpt nanoGPT --json 124m.json --steps 4 --warmup 1 --repeats 2

Every repeat of a contender is a separate process (`benchmarks/training_peers.py`). Contenders alternate, so that other
load affects all of them equally; only ratios within one file are meaningful. The speed of a repeat is that of its
median step after the warmup, its memory the peak resident memory of its process.
"""

import argparse
import dataclasses
import importlib.util
import json
import math
import os
import shlex
import subprocess
import sys
import tempfile
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.common import run_interleaved
from benchmarks.report import format_peers
from benchmarks.training_peers import (
    BF16,
    COMPILED,
    CONTENDERS,
    DEFAULTS,
    FP32,
    FP32_COMPILED,
    LEAN,
    LIBRARIES,
    NANOGPT,
    OURS,
    SEED,
    Spec,
)
from gpt.machine.environment import describe_environment

MODELS = {
    "10m": {"n_layer": 6, "n_head": 6, "n_embd": 384, "block_size": 256, "vocab_size": 65, "batch": 8},
    "124m": {"n_layer": 12, "n_head": 12, "n_embd": 768, "block_size": 1024, "vocab_size": 50304, "batch": 4},
}
"""nanoGPT's shakespeare_char, and GPT-2 small; `batch` is the number of sequences per step, in one forward pass."""
PEER_SETTINGS = (FP32, BF16, COMPILED)
LOSS_TOLERANCE = 0.3
"""Maximum distance, in nats, of a new model's loss from that of a uniform guess."""


def main() -> None:
    """Measure, check that all trained the same model, print a table, and write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=MODELS, default="10m")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--steps", type=int, default=15, help="steps of each process, warmup included")
    parser.add_argument("--warmup", type=int, default=4, help="steps that are not measured")
    parser.add_argument(
        "--settings",
        nargs="+",
        choices=(*PEER_SETTINGS, FP32_COMPILED),
        default=PEER_SETTINGS,
        help=f"settings of the peers; with {FP32_COMPILED!r} this project is measured in float32, with and without it",
    )
    parser.add_argument("--nanogpt", type=Path, help="checkout of nanoGPT")
    parser.add_argument("--json", type=Path, help="file for all measurements")
    parser.add_argument("--threads", type=int, default=0, help="threads of every process; 0: torch's default")
    arguments = parser.parse_args()
    if not 0 < arguments.warmup < arguments.steps:
        parser.error("--warmup must be at least 1, because the first step is slower, and less than --steps")

    contenders, left_out = _find_contenders(arguments.nanogpt, arguments.settings)
    with tempfile.TemporaryDirectory() as name:
        spec = _build_spec(Path(name), arguments.model, arguments.steps, arguments.nanogpt)
        runs = run_interleaved(
            {contender: partial(_measure, *contender, spec, left_out, arguments.threads) for contender in contenders},
            dict.fromkeys(contenders, arguments.repeats),
        )
    results = [
        {"contender": contender, "setting": setting, "runs": [run for run in measured if run]}
        for (contender, setting), measured in runs.items()
        if any(measured)
    ]
    result = {
        "benchmark": "peers",
        "model": arguments.model,
        "sizes": MODELS[arguments.model],
        "warmup": arguments.warmup,
        "flags": f"--repeats {arguments.repeats} --steps {arguments.steps} --warmup {arguments.warmup}"
        + (f" --threads {arguments.threads}" if arguments.threads else "")
        + ("" if tuple(arguments.settings) == PEER_SETTINGS else f" --settings {shlex.join(arguments.settings)}"),
        "machine": describe_environment({}),
        "left_out": left_out,
        "results": results,
    }
    if arguments.json:
        arguments.json.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    print(format_peers(result))
    _require_same(results, MODELS[arguments.model])


def _find_contenders(checkout: Path | None, settings: list[str]) -> tuple[list[tuple[str, str]], dict[str, str]]:
    """Return (name, setting) of the contenders that can run, and name -> reason for those that cannot."""
    own = (DEFAULTS, FP32, FP32_COMPILED) if FP32_COMPILED in settings else (DEFAULTS, LEAN)
    contenders, left_out = [(OURS, setting) for setting in own], {}
    for name in CONTENDERS:
        missing = [library for library in LIBRARIES[name] if importlib.util.find_spec(library) is None]
        if name == OURS:
            continue
        if missing:
            left_out[name] = f"not installed: {', '.join(missing)}"
        elif name == NANOGPT and checkout is None:
            left_out[name] = "no checkout given"
        elif name == NANOGPT and not (checkout / "model.py").is_file():
            raise SystemExit(f"--nanogpt {checkout}: there is no model.py")
        else:
            contenders += [(name, setting) for setting in settings]
    return contenders, left_out


def _build_spec(folder: Path, model: str, steps: int, checkout: Path | None) -> Spec:
    """Write random tokens for every step and a tokenizer of the same size; return the task."""
    sizes = MODELS[model]
    tokens, tokenizer = folder / "tokens.bin", folder / "tokenizer.json"
    count = (steps + 2) * sizes["batch"] * (sizes["block_size"] + 1)
    np.random.default_rng(SEED).integers(0, sizes["vocab_size"], count, dtype=np.uint16).tofile(tokens)
    words = {f"w{number}": number for number in range(sizes["vocab_size"])}
    definition = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [],
        "normalizer": None,
        "pre_tokenizer": {"type": "WhitespaceSplit"},
        "post_processor": None,
        "decoder": None,
        "model": {"type": "WordLevel", "vocab": words, "unk_token": "w0"},
    }
    tokenizer.write_text(json.dumps(definition), encoding="utf-8")
    nanogpt = str(checkout.resolve()) if checkout else ""
    return Spec(**sizes, steps=steps, tokens=str(tokens), tokenizer=str(tokenizer), nanogpt=nanogpt)


def _measure(name: str, setting: str, spec: Spec, left_out: dict[str, str], threads: int) -> dict[str, Any] | None:
    """Measure one process; return None if it failed, and record the reason in `left_out`."""
    label = f"{name}, {setting}"
    if label in left_out:
        return None
    load = os.getloadavg()[0]
    command = [sys.executable, "-m", "benchmarks.training_peers", name, setting]
    command.append(json.dumps(dataclasses.asdict(spec)))
    env = os.environ | {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    if threads:
        env["OMP_NUM_THREADS"] = str(threads)
    done = subprocess.run(command, env=env, capture_output=True, text=True)
    if done.returncode:
        if name == OURS:
            raise SystemExit(done.stderr)
        left_out[label] = f"failed: {(done.stderr.strip().splitlines() or ['no message'])[-1][:200]}"
        return None
    run: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    step, cpu, peak = run["step_seconds"][-1], run["step_cpu_seconds"][-1], run["peak_bytes"] / 1e9
    summary = f"last step {step:8.3f} s, CPU {cpu:8.3f} s, {peak:.2f} GB, load average {load:.1f}"
    print(f"{label:40} {summary}", file=sys.stderr, flush=True)
    return run | {"load_average": load}


def _require_same(results: list[dict[str, Any]], sizes: dict[str, int]) -> None:
    """Check that all contenders trained the same model from scratch.

    litgpt has no position embedding. Apart from that and from padding of the vocabulary, parameter counts are equal.
    """
    expected = results[0]["runs"][0]["parameters"]
    for result in results:
        for run in result["runs"]:
            label = f"{result['contender']}, {result['setting']}"
            if abs(run["parameters"] - expected) > sizes["block_size"] * sizes["n_embd"]:
                raise SystemExit(f"NOT THE SAME MODEL: {label} has {run['parameters']:,} parameters, ours {expected:,}")
            if not abs(run["first_loss"] - math.log(sizes["vocab_size"])) < LOSS_TOLERANCE:
                raise SystemExit(f"NOT FROM SCRATCH: {label} has a first loss of {run['first_loss']:.3f}")
    print("equal parameter counts (litgpt: without positions), and all started at the loss of a uniform guess")


if __name__ == "__main__":
    main()
