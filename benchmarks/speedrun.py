"""Whole programs side by side: `gpt train speedrun-char` and the CPU command of nanoGPT's README.

    git clone https://github.com/karpathy/nanoGPT
    python -m benchmarks.speedrun --nanogpt nanoGPT --text tinyshakespeare.txt --json speedrun.json

Each is a separate process that starts, trains and ends; they alternate. Ours prepares the text within that time, with
an empty cache; nanoGPT's own script prepares it beforehand. nanoGPT runs in a copy, and the checkout stays unchanged.
"""

import argparse
import json
import os
import re
import shutil
import sys
import tempfile
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks.common import Cost, measure_program, run_interleaved
from benchmarks.report import format_speedrun
from gpt.machine.environment import describe_environment

OURS, NANOGPT = "gpt train speedrun-char", "nanoGPT"
COMMAND = (
    "train.py config/train_shakespeare_char.py --device=cpu --compile=False --eval_iters=20 --log_interval=1 "
    "--block_size=64 --batch_size=12 --n_layer=4 --n_head=4 --n_embd=128 --max_iters=2000 --lr_decay_iters=2000 "
    "--dropout=0.0"
)
"""nanoGPT's README, "quick start", "I only have a macbook"."""
VALIDATION = re.compile(r"step (\d+): train loss [\d.]+, val loss ([\d.]+)")


def main() -> None:
    """Measure, print a table, and write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--nanogpt", type=Path, required=True, help="checkout of nanoGPT")
    parser.add_argument("--text", type=Path, required=True, help="text of about a megabyte")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--json", type=Path, help="file for all measurements")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        copy = Path(name) / "nanogpt"
        _copy_with_data(arguments.nanogpt, copy, arguments.text)
        contenders = {OURS: partial(_run_ours, arguments.text), NANOGPT: partial(_run_nanogpt, copy)}
        results = run_interleaved(contenders, dict.fromkeys(contenders, arguments.repeats))
    result = {
        "benchmark": "speedrun",
        "flags": f"--repeats {arguments.repeats}",
        "machine": describe_environment({}),
        "results": results,
    }
    if arguments.json:
        arguments.json.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    print(format_speedrun(result))


def _run_ours(text: Path) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as name:
        run = Path(name) / "run"
        flags = ["--data.source", text, "--data.cache-dir", f"{name}/cache", "--run-dir", run, "--device", "cpu"]
        load = os.getloadavg()[0]
        cost = measure_program([sys.executable, "-m", "gpt.main", "train", "speedrun-char", *flags])
        records = [json.loads(line) for line in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    loss = [record["val/loss"] for record in records if "val/loss" in record][-1]
    return _build_record(cost, loss, load, "the whole held-out 10%")


def _run_nanogpt(copy: Path) -> dict[str, Any]:
    load = os.getloadavg()[0]
    with tempfile.TemporaryFile("w+", encoding="utf-8") as output:
        cost = measure_program([sys.executable, *COMMAND.split()], cwd=copy, stdout=output)
        output.seek(0)
        step, loss = VALIDATION.findall(output.read())[-1]
    return _build_record(cost, float(loss), load, f"20 random batches at step {step}")


def _build_record(cost: Cost, loss: float, load: float, validation: str) -> dict[str, Any]:
    print(f"{cost.seconds:7.1f} s, val/loss {loss:.4f}, load average {load:.1f}", file=sys.stderr, flush=True)
    return {
        "seconds": cost.seconds,
        "cpu_seconds": cost.cpu_seconds,
        "val_loss": loss,
        "validation": validation,
        "load_average": load,
    }


def _copy_with_data(checkout: Path, copy: Path, text: Path) -> None:
    """Copy nanoGPT and prepare the text with its own script."""
    try:
        shutil.copytree(checkout, copy, ignore=shutil.ignore_patterns(".git", "assets", "*.ipynb", "*.bin", "out*"))
        data = copy / "data" / "shakespeare_char"
        shutil.copyfile(text, data / "input.txt")
    except OSError as error:
        raise SystemExit(f"{error.filename}: {error.strerror}") from error
    measure_program([sys.executable, data / "prepare.py"])


if __name__ == "__main__":
    main()
