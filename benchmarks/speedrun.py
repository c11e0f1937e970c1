"""Whole programs side by side: `gpt train speedrun-char` and the CPU command of nanoGPT's README.

    git clone https://github.com/karpathy/nanoGPT
    python -m benchmarks.speedrun --nanogpt nanoGPT --text tinyshakespeare.txt --json speedrun.json

Each is a process of its own that starts, trains and ends; they take turns. Ours prepares the text within that time, in
an empty cache; nanoGPT's own script prepares it beforehand. nanoGPT runs in a copy, and the checkout stays as it is.
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

from benchmarks.common import Cost, cost_of, interleaved
from benchmarks.report import speedrun_section
from gpt.machine.environment import environment

OURS, NANOGPT = "gpt train speedrun-char", "nanoGPT"
COMMAND = (
    "train.py config/train_shakespeare_char.py --device=cpu --compile=False --eval_iters=20 --log_interval=1 "
    "--block_size=64 --batch_size=12 --n_layer=4 --n_head=4 --n_embd=128 --max_iters=2000 --lr_decay_iters=2000 "
    "--dropout=0.0"
)
"""nanoGPT's README, "quick start", "I only have a macbook"."""
VALIDATION = re.compile(r"step (\d+): train loss [\d.]+, val loss ([\d.]+)")


def main() -> None:
    """Measure, print a table, write the JSON."""
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--nanogpt", type=Path, required=True, help="a checkout of it")
    arguments.add_argument("--text", type=Path, required=True, help="a text of about a megabyte")
    arguments.add_argument("--repeats", type=int, default=3)
    arguments.add_argument("--json", type=Path, help="file for everything that was measured")
    given = arguments.parse_args()
    with tempfile.TemporaryDirectory() as name:
        copy = Path(name) / "nanogpt"
        _copy_with_data(given.nanogpt, copy, given.text)
        contenders = {OURS: partial(_ours, given.text), NANOGPT: partial(_nanogpt, copy)}
        results = interleaved(contenders, dict.fromkeys(contenders, given.repeats))
    result = {
        "benchmark": "speedrun",
        "flags": f"--repeats {given.repeats}",
        "machine": environment({}),
        "results": results,
    }
    if given.json:
        given.json.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    print(speedrun_section(result))


def _ours(text: Path) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as name:
        run = Path(name) / "run"
        flags = ["--data.source", text, "--data.cache-dir", f"{name}/cache", "--run-dir", run, "--device", "cpu"]
        load = os.getloadavg()[0]
        cost = cost_of([sys.executable, "-m", "gpt.main", "train", "speedrun-char", *flags])
        records = [json.loads(line) for line in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    loss = [record["val/loss"] for record in records if "val/loss" in record][-1]
    return _record(cost, loss, load, "the whole held-out tenth")


def _nanogpt(copy: Path) -> dict[str, Any]:
    load = os.getloadavg()[0]
    with tempfile.TemporaryFile("w+", encoding="utf-8") as output:
        cost = cost_of([sys.executable, *COMMAND.split()], cwd=copy, stdout=output)
        output.seek(0)
        step, loss = VALIDATION.findall(output.read())[-1]
    return _record(cost, float(loss), load, f"20 random batches at step {step}")


def _record(cost: Cost, loss: float, load: float, validation: str) -> dict[str, Any]:
    print(f"{cost.seconds:7.1f} s, val/loss {loss:.4f}, load average {load:.1f}", file=sys.stderr, flush=True)
    return {
        "seconds": cost.seconds,
        "cpu_seconds": cost.cpu_seconds,
        "val_loss": loss,
        "validation": validation,
        "load_average": load,
    }


def _copy_with_data(checkout: Path, copy: Path, text: Path) -> None:
    """What nanoGPT's command reads, and the data set that its prepare.py makes of the text."""
    try:
        shutil.copytree(checkout, copy, ignore=shutil.ignore_patterns(".git", "assets", "*.ipynb", "*.bin", "out*"))
        data = copy / "data" / "shakespeare_char"
        shutil.copyfile(text, data / "input.txt")
    except OSError as error:
        raise SystemExit(f"{error.filename}: {error.strerror}") from error
    cost_of([sys.executable, data / "prepare.py"])


if __name__ == "__main__":
    main()
