"""Cost of a checkpoint of GPT-2 small with AdamW's state: the time a save blocks training, and verification.

    python -m benchmarks.checkpoints
    python -m benchmarks.checkpoints --json

A save blocks training from its call to its return: an asynchronous one until the state is copied, a synchronous one
until it is on the disk. Verification reads the same files as `sha256sum`, all of them in the page cache. Saves and
reads are interleaved; each save waits for the previous one to finish.
"""

import argparse
import json
import statistics
import subprocess
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch

from benchmarks.common import format_spread, format_verdict, run_interleaved
from gpt.checkpoint.app_state import AppState, Progress
from gpt.checkpoint.manager import CheckpointManager
from gpt.checkpoint.manifest import FILES, verify
from gpt.checkpoint.run_folder import RunFolder
from gpt.configs.checkpoint_config import CheckpointConfig
from gpt.configs.presets import PRESETS
from gpt.models.gpt import GPT
from gpt.optim.build import build_optimizer
from gpt.utils.distributed import DistContext

MAX_STALL_RATIO, MAX_VERIFY_RATIO = 0.15, 1.0
"""Asynchronous over synchronous save, and verification over `sha256sum`."""


def main() -> None:
    """Save and verify, interleaved, and print medians."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=4)
    parser.add_argument("--folder", type=Path, help="folder on the disk to measure; default: that of temporary files")
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=arguments.folder) as name:
        seconds, size = _measure(Path(name), arguments.repeats)
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    stall = medians["asynchronous save"] / medians["synchronous save"]
    verification = medians["verify"] / medians["sha256sum"]
    if arguments.json:
        print(json.dumps({"bytes": size, "seconds": seconds, "stall": stall, "verification": verification}))
        return
    print(f"a checkpoint of {size / 1e9:.2f} GB, {torch.get_num_threads()} threads")
    for name, values in seconds.items():
        print(f"  {name:20} {format_spread(values, ' s', 3)}")
    for name, ratio, limit in (
        ("asynchronous / synchronous", stall, MAX_STALL_RATIO),
        ("verify / sha256sum", verification, MAX_VERIFY_RATIO),
    ):
        print(f"  {name:26} {ratio:.3f}   {format_verdict(ratio, limit, at_least=False)}")


def _measure(folder: Path, repeats: int) -> tuple[dict[str, list[float]], int]:
    """Return seconds of each repeat by name, and the size of a checkpoint in bytes."""
    state = _build_state()
    modes = ("asynchronous", "synchronous")
    saves = {mode: _build_save(folder / mode, state, asynchronous=mode == "asynchronous") for mode in modes}
    saves["asynchronous"]()  # allocates the host buffers
    costs = run_interleaved(saves, dict.fromkeys(saves, repeats))
    seconds = {f"{mode} save": values for mode, values in costs.items()}
    [checkpoint] = RunFolder(folder / "synchronous").list_checkpoints()
    files = [checkpoint / name for name in FILES]
    reads = {
        "verify": lambda: _time(lambda: verify(checkpoint)),
        "sha256sum": lambda: _time(lambda: subprocess.run(["sha256sum", *files], check=True, capture_output=True)),
    }
    verify(checkpoint)  # brings the files into the page cache
    seconds |= run_interleaved(reads, dict.fromkeys(reads, repeats))
    return seconds, sum(file.stat().st_size for file in files)


def _build_state() -> AppState:
    """Build a model and update it once, so that its optimizer has state."""
    config = PRESETS["gpt2-124m"]()
    model = GPT(config.model, seed=0)
    optimizer = build_optimizer(model, config.optimizer, max_lr=1e-3)
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    optimizer.zero_grad()
    return AppState(model, optimizer, torch.amp.GradScaler("cpu", enabled=False), torch.tensor(0), {})


def _build_save(run_dir: Path, state: AppState, *, asynchronous: bool) -> Callable[[], float]:
    """Return a function that commits the next step and returns the seconds that it blocked."""
    config = CheckpointConfig(keep=1, asynchronous=asynchronous)
    manager = CheckpointManager(RunFolder(run_dir), config, "{}", DistContext("cpu"))

    def save() -> float:
        state.progress = Progress(state.progress.step + 1)
        seconds = _time(lambda: manager.save(state))
        manager.finish()
        return seconds

    return save


def _time(work: Callable[[], object]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


if __name__ == "__main__":
    main()
