"""Training speed and memory beside other trainers of GPTs: one model, one batch, one machine, in turn.

    pip install -e '.[bench]'
    git clone https://github.com/karpathy/nanoGPT
    python -m benchmarks.peers --model 10m --nanogpt nanoGPT --json 10m.json
    python -m benchmarks.peers --model 124m --nanogpt nanoGPT --json 124m.json --steps 4 --warmup 1 --repeats 2

Every contender is a process of its own each time (`benchmarks/training_peers.py`), and they take turns, so that what
else the machine does meets all of them alike; only the ratios of one file mean something. A repeat's rate is that of
its median step after the warm-up, its memory the most that its process had resident by the end of the training.
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

from benchmarks.common import interleaved
from benchmarks.report import peers_section
from benchmarks.training_peers import (
    BF16,
    COMPILED,
    CONTENDERS,
    DEFAULTS,
    FP32,
    LEAN,
    LIBRARIES,
    NANOGPT,
    OURS,
    SEED,
    Spec,
)
from gpt.machine.environment import environment

MODELS = {
    "10m": {"n_layer": 6, "n_head": 6, "n_embd": 384, "block_size": 256, "vocab_size": 65, "batch": 8},
    "124m": {"n_layer": 12, "n_head": 12, "n_embd": 768, "block_size": 1024, "vocab_size": 50304, "batch": 4},
}
"""nanoGPT's shakespeare_char, and GPT-2 small; `batch` is sequences of a step, in one forward pass."""
PEER_SETTINGS = (FP32, BF16, COMPILED)
LOSS_TOLERANCE = 0.3
"""Nats that the loss of a fresh model may be away from that of a uniform guess."""


def main() -> None:
    """Measure, check that all trained the same, print a table, write the JSON."""
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--model", choices=MODELS, default="10m")
    arguments.add_argument("--repeats", type=int, default=5)
    arguments.add_argument("--steps", type=int, default=15, help="of each process, warm-up included")
    arguments.add_argument("--warmup", type=int, default=4, help="steps that do not count")
    arguments.add_argument("--settings", nargs="+", choices=PEER_SETTINGS, default=PEER_SETTINGS, help="of the peers")
    arguments.add_argument("--nanogpt", type=Path, help="a checkout of it")
    arguments.add_argument("--json", type=Path, help="file for everything that was measured")
    arguments.add_argument("--threads", type=int, default=0, help="of every process; 0: what torch takes by itself")
    given = arguments.parse_args()
    if not 0 < given.warmup < given.steps:
        arguments.error("--warmup must be at least 1, for the first step is another, and less than --steps")

    contenders, left_out = _contenders(given.nanogpt, given.settings)
    with tempfile.TemporaryDirectory() as name:
        spec = _spec(Path(name), given.model, given.steps, given.nanogpt)
        runs = interleaved(
            {contender: partial(_measure, *contender, spec, left_out, given.threads) for contender in contenders},
            dict.fromkeys(contenders, given.repeats),
        )
    results = [
        {"contender": contender, "setting": setting, "runs": [run for run in taken if run]}
        for (contender, setting), taken in runs.items()
        if any(taken)
    ]
    result = {
        "benchmark": "peers",
        "model": given.model,
        "sizes": MODELS[given.model],
        "warmup": given.warmup,
        "flags": f"--repeats {given.repeats} --steps {given.steps} --warmup {given.warmup}"
        + (f" --threads {given.threads}" if given.threads else "")
        + ("" if tuple(given.settings) == PEER_SETTINGS else f" --settings {shlex.join(given.settings)}"),
        "machine": environment({}),
        "left_out": left_out,
        "results": results,
    }
    if given.json:
        given.json.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    print(peers_section(result))
    _require_same(results, MODELS[given.model])


def _contenders(checkout: Path | None, settings: list[str]) -> tuple[list[tuple[str, str]], dict[str, str]]:
    """(name, setting) of those that can run here, and for each of the others the reason why it cannot."""
    contenders, left_out = [(OURS, DEFAULTS), (OURS, LEAN)], {}
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


def _spec(folder: Path, model: str, steps: int, checkout: Path | None) -> Spec:
    """With a file of random tokens, enough for every step, and a tokenizer of as many made-up words."""
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
    """One process; None where it failed, which `left_out` then says."""
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
    told = f"{step:8.3f} s the last step, {cpu:8.3f} s of CPU, {peak:.2f} GB, load average {load:.1f}"
    print(f"{label:40} {told}", file=sys.stderr, flush=True)
    return run | {"load_average": load}


def _require_same(results: list[dict[str, Any]], sizes: dict[str, int]) -> None:
    """Everybody trained the same model, from a fresh start.

    litgpt has no table of positions; apart from that and from rows that pad the vocabulary the numbers are the same.
    """
    expected = results[0]["runs"][0]["parameters"]
    for result in results:
        for run in result["runs"]:
            label = f"{result['contender']}, {result['setting']}"
            if abs(run["parameters"] - expected) > sizes["block_size"] * sizes["n_embd"]:
                raise SystemExit(f"NOT THE SAME MODEL: {label} has {run['parameters']:,} parameters, ours {expected:,}")
            if not abs(run["first_loss"] - math.log(sizes["vocab_size"])) < LOSS_TOLERANCE:
                raise SystemExit(f"NOT A FRESH START: {label} has a first loss of {run['first_loss']:.3f}")
    print("all had the same number of parameters, litgpt less the positions, and began at the loss of a uniform guess")


if __name__ == "__main__":
    main()
