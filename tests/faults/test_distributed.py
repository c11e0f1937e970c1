"""Faults of single ranks under torchrun: signals, kills, hangs, stragglers, weights that differ.

`tests/distributed/test_reproducible.py` tests that the bits do not depend on the number of ranks.
"""

import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from gpt.checkpoint.manifest import verify
from gpt.checkpoint.run_folder import RunFolder
from gpt.configs.train_config import TrainConfig
from tests.invariants.test_bits import read_losses

pytestmark = pytest.mark.faults
MAIN = Path(__file__).resolve().parents[2] / "gpt" / "main.py"
MAX_STEPS = 300
INJECTION_STEP = 40
TIMEOUT_SECONDS = 120.0


class Launch:
    """Run of two ranks under torchrun, whose output is read while it runs."""

    def __init__(self, *arguments: str | Path, options: tuple[str, ...] = ()):
        self._process = subprocess.Popen(
            [
                *(sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"),
                *(*options, *map(str, arguments)),
            ],
            env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"},
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        )  # fmt: skip
        self.pid = self._process.pid
        self.output = ""
        self._reader = threading.Thread(target=self._read)
        self._reader.start()

    def _read(self) -> None:
        assert self._process.stdout is not None
        with self._process.stdout as lines:
            for line in lines:
                self.output += line

    def wait_for(self, condition: Callable[[], bool]) -> None:
        deadline = time.monotonic() + TIMEOUT_SECONDS
        while not condition():
            assert self._process.poll() is None and time.monotonic() < deadline, self.output
            time.sleep(0.01)

    def wait_for_text(self, text: str) -> None:
        self.wait_for(lambda: text in self.output)

    def find_worker(self, rank: int) -> int:
        """Return the process id of a rank."""
        for child in Path(f"/proc/{self.pid}/task/{self.pid}/children").read_text().split():
            if f"\0RANK={rank}\0" in Path(f"/proc/{child}/environ").read_text():
                return int(child)
        raise AssertionError(f"rank {rank} does not run: {self.output}")

    def wait(self) -> int:
        """Wait for torchrun to exit and return its exit status."""
        self._process.wait(TIMEOUT_SECONDS)
        self._reader.join()
        return self._process.returncode

    def kill(self) -> None:
        """Kill torchrun and its ranks if they still run."""
        if self._process.poll() is None:
            children = Path(f"/proc/{self.pid}/task/{self.pid}/children").read_text().split()
            for pid in (self.pid, *map(int, children)):
                os.kill(pid, signal.SIGKILL)
        self.wait()


@contextmanager
def run_torchrun(*arguments: str | Path, options: tuple[str, ...] = ()) -> Iterator[Launch]:
    launch = Launch(*arguments, options=options)
    try:
        yield launch
    finally:
        launch.kill()


class Runs:
    """Launches `gpt train` with variants of one configuration, each in a folder of its own."""

    def __init__(self, tiny: Callable[..., TrainConfig], folder: Path):
        self._tiny, self._folder = tiny, folder

    def path(self, name: str) -> Path:
        return self._folder / name

    def write_config(self, name: str, **changes: object) -> Path:
        """Write the configuration of the run `name` and return its file."""
        checkpoint = {"interval": 25}
        settings = {
            "max_steps": MAX_STEPS,
            "model": {"dropout": 0.1},
            "eval": {"interval": 0},
            "checkpoint": checkpoint,
        }
        config = self._tiny(self.path(name), **settings | {"sample": {"prompts": ()}} | changes)
        file = self._folder / f"{name}.json"
        file.write_text(config.model_dump_json())
        return file

    def train(self, name: str, *flags: str, options: tuple[str, ...] = ()) -> Iterator[Launch]:
        return run_torchrun(MAIN, "train", "--config", self.write_config(name), *flags, options=options)  # type: ignore

    def count_logged_steps(self, name: str) -> int:
        """Return the number of steps in metrics.jsonl."""
        metrics = self.path(name) / "metrics.jsonl"
        return metrics.read_text().count("\n") if metrics.exists() else 0

    def assert_bit_exact(self, name: str) -> None:
        """Assert that losses, weights and optimizer state are those of the reference run."""
        assert read_losses(self.path(name)) == read_losses(self.path("reference"))
        for file in ("model.safetensors", "optimizer.safetensors"):
            actual, expected = (
                (self.path(run) / "checkpoints" / f"step_{MAX_STEPS:08d}" / file).read_bytes()
                for run in (name, "reference")
            )
            assert actual == expected


@pytest.fixture(scope="module")
def runs(tiny: Callable[..., TrainConfig], tmp_path_factory: pytest.TempPathFactory) -> Runs:
    """Train the reference run, without any fault."""
    runs = Runs(tiny, tmp_path_factory.mktemp("faults"))
    with runs.train("reference") as launch:
        assert launch.wait() == 0, launch.output
    assert len(read_losses(runs.path("reference"))) == MAX_STEPS
    return runs


def test_sigterm_to_one_rank_stops_both_after_one_step_and_resume_is_bit_exact(runs: Runs) -> None:
    with runs.train("terminated") as launch:
        launch.wait_for(lambda: runs.count_logged_steps("terminated") >= INJECTION_STEP)
        os.kill(launch.find_worker(1), signal.SIGTERM)
        assert launch.wait() != 0
    assert "SIGTERM at step" in launch.output
    assert "exitcode  : 143" in launch.output
    last_step = len(read_losses(runs.path("terminated")))
    assert INJECTION_STEP <= last_step < MAX_STEPS
    assert RunFolder(runs.path("terminated")).list_checkpoints()[-1].name == f"step_{last_step:08d}"
    with runs.train("terminated") as launch:
        assert launch.wait() == 0, launch.output
    runs.assert_bit_exact("terminated")


def test_killed_rank_is_restarted_and_the_run_is_bit_exact(runs: Runs) -> None:
    with runs.train("killed", options=("--max-restarts=3",)) as launch:
        launch.wait_for(lambda: runs.count_logged_steps("killed") >= INJECTION_STEP)
        os.kill(launch.find_worker(1), signal.SIGKILL)
        assert launch.wait() == 0, launch.output
    assert "resuming from" in launch.output
    runs.assert_bit_exact("killed")


def test_hung_rank_is_named_at_the_step_timeout_and_restarted(runs: Runs) -> None:
    with runs.train("hung", "--parallel.step-timeout", "2", options=("--max-restarts=3",)) as launch:
        launch.wait_for(lambda: runs.count_logged_steps("hung") >= INJECTION_STEP)
        os.kill(stopped_rank := launch.find_worker(1), signal.SIGSTOP)
        launch.wait_for_text("gpt: error: rank 1 took no part in a step for 2 s (--parallel.step-timeout)")
        launch.wait_for_text("closing signal SIGTERM")
        os.kill(stopped_rank, signal.SIGKILL)  # as torchrun does half a minute later
        assert launch.wait() == 0, launch.output
    assert "resuming from" in launch.output
    runs.assert_bit_exact("hung")


def test_straggler_is_named_and_a_save_beyond_the_grace_period_leaves_valid_checkpoints(runs: Runs) -> None:
    if shutil.which("strace") is None:
        pytest.skip("needs strace, which slows down the disk")
    endless = ("--max-steps", "100000", "--log.interval", "10")
    with runs.train("slow", *endless, options=("--shutdown-timeout=2",)) as launch:
        launch.wait_for(lambda: runs.count_logged_steps("slow") >= 5)
        straggler = launch.find_worker(1)
        while "rank 1 is slow, and the others wait for it" not in launch.output:
            os.kill(straggler, signal.SIGSTOP)
            time.sleep(0.018)
            os.kill(straggler, signal.SIGCONT)
            time.sleep(0.002)
            launch.wait_for(lambda: True)
        before = runs.count_logged_steps("slow")
        launch.wait_for(lambda: runs.count_logged_steps("slow") > before)
        slow_fsync = (
            "-f",
            "-qq",
            "-e",
            "trace=fsync",
            "-e",
            "inject=fsync:delay_enter=6s",
            "-p",
            str(launch.find_worker(0)),
        )
        with subprocess.Popen(["strace", *slow_fsync], stderr=subprocess.DEVNULL) as strace:
            time.sleep(0.3)
            os.kill(launch.pid, signal.SIGTERM)
            assert launch.wait() != 0
            strace.wait(TIMEOUT_SECONDS)
    committed = RunFolder(runs.path("slow")).list_checkpoints()
    assert committed
    for checkpoint in committed:
        verify(checkpoint)


EVALUATION_AND_BIT_FLIP_SCRIPT = """
import sys, time
from pathlib import Path
import torch
from gpt.configs.train_config import TrainConfig
from gpt.run import open_run
from gpt.pipeline import build_trainer
from gpt.training.evaluator import Evaluator
from gpt.training.events import StepEnd
from gpt.training.observer import Observer

def load_config(path):
    return TrainConfig.model_validate_json(Path(path).read_text())

class SlowTask:
    name = "slow"

    def run(self, model):
        time.sleep(2.5)
        return {"slow": 1.0}

class BitFlip(Observer):
    def __init__(self, model, rank):
        self._model, self._rank = model, rank

    def on_event(self, event):
        if isinstance(event, StepEnd) and event.step == 7 and self._rank == 1:
            weight = self._model.get_submodule("wte").weight
            weight.detach().view(torch.int32)[3, 5] ^= 1
        return ()

run = open_run(load_config(sys.argv[1]))
run.dist.on_main(lambda: time.sleep(2.5))
trainer = build_trainer(run)
trainer.attach(Evaluator(trainer._state.model, [SlowTask()], run.plan))
assert trainer.train() == "finished"
run.dist.close()

run = open_run(load_config(sys.argv[2]))
trainer = build_trainer(run)
trainer.attach(BitFlip(trainer._state.model, run.dist.rank))
trainer.train()
"""


def test_evaluation_beyond_the_step_timeout_does_not_end_the_run_but_a_flipped_bit_does(runs: Runs) -> None:
    """Exceed the step timeout in an evaluation and on rank 0 alone, then flip one bit of a weight on rank 1."""
    script = runs.path("script.py")
    script.write_text(EVALUATION_AND_BIT_FLIP_SCRIPT)
    slow = runs.write_config("evaluated", max_steps=4, eval={"interval": 2}, parallel={"step_timeout": 1})
    flipped = runs.write_config("flipped", max_steps=40, checkpoint={"interval": 4}, parallel={"check_replicas": 5})
    with run_torchrun(script, slow, flipped) as launch:
        assert launch.wait() != 0
    assert len(read_losses(runs.path("evaluated"))) == 4, launch.output
    assert "UserError: the weights of rank 1 differ from those of rank 0 after step 8" in launch.output
    committed = RunFolder(runs.path("flipped")).list_checkpoints()
    assert [checkpoint.name for checkpoint in committed] == ["step_00000004"]
    verify(committed[0])


STALE_MOUNT_SCRIPT = """
import ctypes, os, shutil, subprocess, sys
from pathlib import Path
from gpt.configs.train_config import TrainConfig
from gpt.run import open_run
from gpt.pipeline import build_trainer
from gpt.utils.launch import end_process

config = TrainConfig.model_validate_json(Path(sys.argv[1]).read_text())
folder, stale = config.run_dir / "checkpoints", Path(sys.argv[2])
if os.environ["RANK"] == "0":
    assert ctypes.CDLL(None).unshare(0x00020000) == 0  # CLONE_NEWNS, a mount namespace of its own
    subprocess.run(["mount", "--make-rprivate", "/"], check=True)
    subprocess.run(["mount", "--bind", stale, folder], check=True)
run = open_run(config)
assert run.start.checkpoint == folder / "step_00000004", run.start.checkpoint
build_trainer(run).train()
run.dist.close()
end_process()
"""


def test_rank_0_chooses_the_checkpoint_if_its_mount_is_stale(runs: Runs) -> None:
    """Show rank 0 an older state of the folder than rank 1 sees, as a network file system may."""
    if os.geteuid() != 0:
        pytest.skip("mounting needs root")
    script, stale = runs.path("stale.py"), runs.path("stale")
    script.write_text(STALE_MOUNT_SCRIPT)
    config = runs.write_config("seen", max_steps=8, checkpoint={"interval": 4})
    with run_torchrun(MAIN, "train", "--config", config) as launch:
        assert launch.wait() == 0, launch.output
    shutil.copytree(runs.path("seen") / "checkpoints" / "step_00000004", stale / "step_00000004")
    expected = read_losses(runs.path("seen"))
    with run_torchrun(script, config, stale) as launch:
        assert launch.wait() == 0, launch.output
    assert read_losses(runs.path("seen")) == expected
    newest = "step_00000008/model.safetensors"
    assert (stale / newest).read_bytes() == (runs.path("seen") / "checkpoints" / newest).read_bytes()
