"""What a checkpoint of GPT-2 small with AdamW's state costs: how long a save holds the training, and verification.

    python -m benchmarks.checkpoints
    python -m benchmarks.checkpoints --json

A save holds the training from its call to its return: asynchronous until the state is copied, synchronous until it is
on the disk. Verification reads the same files as `sha256sum` does, all of them in memory. Saves and readings are
interleaved; each save waits until the one before it is finished.
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

from benchmarks.common import interleaved, spread, verdict
from gpt.checkpoint.app_state import AppState, Progress
from gpt.checkpoint.manager import CheckpointManager
from gpt.checkpoint.manifest import FILES, verify
from gpt.checkpoint.run_folder import RunFolder
from gpt.configs.checkpoint_config import CheckpointConfig
from gpt.configs.presets import PRESETS
from gpt.models.gpt import GPT
from gpt.optim.build import build_optimizer
from gpt.utils.distributed import DistContext

MOST_STALL, MOST_VERIFICATION = 0.15, 1.0


def main() -> None:
    """Save and verify in turn, print medians."""
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--repeats", type=int, default=4)
    arguments.add_argument("--folder", type=Path, help="on the disk to measure; default: where temporary files go")
    arguments.add_argument("--json", action="store_true")
    given = arguments.parse_args()
    with tempfile.TemporaryDirectory(dir=given.folder) as name:
        seconds, size = _measure(Path(name), given.repeats)
    median = {what: statistics.median(values) for what, values in seconds.items()}
    stall = median["asynchronous save"] / median["synchronous save"]
    verification = median["verify"] / median["sha256sum"]
    if given.json:
        print(json.dumps({"bytes": size, "seconds": seconds, "stall": stall, "verification": verification}))
        return
    print(f"a checkpoint of {size / 1e9:.2f} GB, {torch.get_num_threads()} threads")
    for what, values in seconds.items():
        print(f"  {what:20} {spread(values, ' s', 3)}")
    print(f"  asynchronous / synchronous {stall:.3f}   {verdict(stall, MOST_STALL, at_least=False)}")
    print(
        f"  verify / sha256sum         {verification:.3f}   {verdict(verification, MOST_VERIFICATION, at_least=False)}"
    )


def _measure(folder: Path, repeats: int) -> tuple[dict[str, list[float]], int]:
    """Seconds by what was done, and the bytes of a checkpoint."""
    state = _state()
    saves = {
        way: _saving(folder / way, state, asynchronous=way.startswith("a")) for way in ("asynchronous", "synchronous")
    }
    saves["asynchronous"]()  # makes the buffers
    seconds = {f"{way} save": taken for way, taken in interleaved(saves, dict.fromkeys(saves, repeats)).items()}
    [checkpoint] = RunFolder(folder / "synchronous").committed()
    files = [checkpoint / name for name in FILES]
    readings = {
        "verify": lambda: _seconds_of(lambda: verify(checkpoint)),
        "sha256sum": lambda: _seconds_of(
            lambda: subprocess.run(["sha256sum", *files], check=True, capture_output=True)
        ),
    }
    verify(checkpoint)  # brings the files into memory
    seconds |= interleaved(readings, dict.fromkeys(readings, repeats))
    return seconds, sum(file.stat().st_size for file in files)


def _state() -> AppState:
    """A model that was updated once, so that its optimizer has a state."""
    config = PRESETS["gpt2-124m"]()
    model = GPT(config.model, seed=0)
    optimizer = build_optimizer(model, config.optimizer, max_lr=1e-3)
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    optimizer.zero_grad()
    return AppState(model, optimizer, torch.amp.GradScaler("cpu", enabled=False), torch.tensor(0), {})


def _saving(run_dir: Path, state: AppState, *, asynchronous: bool) -> Callable[[], float]:
    """Commits the next step; gives the seconds that the training was held."""
    config = CheckpointConfig(keep=1, asynchronous=asynchronous)
    manager = CheckpointManager(RunFolder(run_dir), config, "{}", DistContext("cpu"))

    def save() -> float:
        state.progress = Progress(state.progress.step + 1)
        held = _seconds_of(lambda: manager.save(state))
        manager.finish()
        return held

    return save


def _seconds_of(work: Callable[[], object]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


if __name__ == "__main__":
    main()
