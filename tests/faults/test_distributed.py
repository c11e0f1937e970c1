"""Faults of processes that train together under torchrun: signals, deaths, hangs, stragglers, weights that differ.

That the bits do not depend on the number of processes is tested in `tests/distributed/test_reproducible.py`.
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
from tests.invariants.test_bits import logged_losses

pytestmark = pytest.mark.faults
MAIN = Path(__file__).resolve().parents[2] / "gpt" / "main.py"
STEPS = 300
INJECTED_AT = 40
LONG_ENOUGH = 120.0


class Launch:
    """A run of two processes under torchrun, its output read as it comes."""

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
        deadline = time.monotonic() + LONG_ENOUGH
        while not condition():
            assert self._process.poll() is None and time.monotonic() < deadline, self.output
            time.sleep(0.01)

    def wait_for_text(self, text: str) -> None:
        self.wait_for(lambda: text in self.output)

    def worker(self, rank: int) -> int:
        """The process id of a rank."""
        for child in Path(f"/proc/{self.pid}/task/{self.pid}/children").read_text().split():
            if f"\0RANK={rank}\0" in Path(f"/proc/{child}/environ").read_text():
                return int(child)
        raise AssertionError(f"rank {rank} is not there: {self.output}")

    def end(self) -> int:
        """Wait for torchrun, and return its status."""
        self._process.wait(LONG_ENOUGH)
        self._reader.join()
        return self._process.returncode

    def kill(self) -> None:
        """Leave no process behind, whatever happened."""
        if self._process.poll() is None:
            children = Path(f"/proc/{self.pid}/task/{self.pid}/children").read_text().split()
            for pid in (self.pid, *map(int, children)):
                os.kill(pid, signal.SIGKILL)
        self.end()


@contextmanager
def launched(*arguments: str | Path, options: tuple[str, ...] = ()) -> Iterator[Launch]:
    launch = Launch(*arguments, options=options)
    try:
        yield launch
    finally:
        launch.kill()


class Runs:
    """Runs of one configuration under `gpt train`."""

    def __init__(self, tiny: Callable[..., TrainConfig], folder: Path):
        self._tiny, self._folder = tiny, folder

    def path(self, name: str) -> Path:
        return self._folder / name

    def write(self, name: str, **changes: object) -> Path:
        """The file of a configuration of the run `name`."""
        every = {"interval": 25}
        settings = {"max_steps": STEPS, "model": {"dropout": 0.1}, "eval": {"interval": 0}, "checkpoint": every}
        config = self._tiny(self.path(name), **settings | {"sample": {"prompts": ()}} | changes)
        file = self._folder / f"{name}.json"
        file.write_text(config.model_dump_json())
        return file

    def train(self, name: str, *flags: str, options: tuple[str, ...] = ()) -> Iterator[Launch]:
        return launched(MAIN, "train", "--config", self.write(name), *flags, options=options)  # type: ignore

    def steps(self, name: str) -> int:
        """How many steps are logged."""
        metrics = self.path(name) / "metrics.jsonl"
        return metrics.read_text().count("\n") if metrics.exists() else 0

    def require_same_bits(self, name: str) -> None:
        """Losses, weights and the optimizer's state are those of the run that nothing happened to."""
        assert logged_losses(self.path(name)) == logged_losses(self.path("whole"))
        for file in ("model.safetensors", "optimizer.safetensors"):
            ours, theirs = (
                (self.path(run) / "checkpoints" / f"step_{STEPS:08d}" / file).read_bytes() for run in (name, "whole")
            )
            assert ours == theirs


@pytest.fixture(scope="module")
def runs(tiny: Callable[..., TrainConfig], tmp_path_factory: pytest.TempPathFactory) -> Runs:
    """With a run `whole` to compare with."""
    runs = Runs(tiny, tmp_path_factory.mktemp("faults"))
    with runs.train("whole") as launch:
        assert launch.end() == 0, launch.output
    assert len(logged_losses(runs.path("whole"))) == STEPS
    return runs


def test_sigterm_to_one_rank_stops_both_after_one_step_and_resuming_is_exact(runs: Runs) -> None:
    with runs.train("one") as launch:
        launch.wait_for(lambda: runs.steps("one") >= INJECTED_AT)
        os.kill(launch.worker(1), signal.SIGTERM)
        assert launch.end() != 0
    assert "SIGTERM at step" in launch.output
    assert "exitcode  : 143" in launch.output
    stopped = len(logged_losses(runs.path("one")))
    assert INJECTED_AT <= stopped < STEPS
    assert RunFolder(runs.path("one")).list_checkpoints()[-1].name == f"step_{stopped:08d}"
    with runs.train("one") as launch:
        assert launch.end() == 0, launch.output
    runs.require_same_bits("one")


def test_a_killed_rank_is_started_again_and_no_bit_is_lost(runs: Runs) -> None:
    with runs.train("killed", options=("--max-restarts=3",)) as launch:
        launch.wait_for(lambda: runs.steps("killed") >= INJECTED_AT)
        os.kill(launch.worker(1), signal.SIGKILL)
        assert launch.end() == 0, launch.output
    assert "continuing from" in launch.output
    runs.require_same_bits("killed")


def test_a_rank_that_hangs_is_named_at_the_step_timeout_and_started_again(runs: Runs) -> None:
    with runs.train("hung", "--parallel.step-timeout", "2", options=("--max-restarts=3",)) as launch:
        launch.wait_for(lambda: runs.steps("hung") >= INJECTED_AT)
        os.kill(hung := launch.worker(1), signal.SIGSTOP)
        launch.wait_for_text("gpt: error: rank 1 took no part in a step for 2 s (--parallel.step-timeout)")
        launch.wait_for_text("closing signal SIGTERM")
        os.kill(hung, signal.SIGKILL)  # as torchrun does half a minute later
        assert launch.end() == 0, launch.output
    assert "continuing from" in launch.output
    runs.require_same_bits("hung")


def test_a_straggler_is_named_and_a_save_that_outlasts_the_grace_period_is_no_checkpoint(runs: Runs) -> None:
    if shutil.which("strace") is None:
        pytest.skip("strace makes the disk slow, and is not there")
    endless = ("--max-steps", "100000", "--log.interval", "10")
    with runs.train("slow", *endless, options=("--shutdown-timeout=2",)) as launch:
        launch.wait_for(lambda: runs.steps("slow") >= 5)
        slow = launch.worker(1)
        while "rank 1 is slow, and the others wait for it" not in launch.output:
            os.kill(slow, signal.SIGSTOP)
            time.sleep(0.018)
            os.kill(slow, signal.SIGCONT)
            time.sleep(0.002)
            launch.wait_for(lambda: True)
        before = runs.steps("slow")
        launch.wait_for(lambda: runs.steps("slow") > before)
        disk = ("-f", "-qq", "-e", "trace=fsync", "-e", "inject=fsync:delay_enter=6s", "-p", str(launch.worker(0)))
        with subprocess.Popen(["strace", *disk], stderr=subprocess.DEVNULL) as strace:
            time.sleep(0.3)
            os.kill(launch.pid, signal.SIGTERM)
            assert launch.end() != 0
            strace.wait(LONG_ENOUGH)
    committed = RunFolder(runs.path("slow")).list_checkpoints()
    assert committed
    for checkpoint in committed:
        verify(checkpoint)


SCRIPT = """
import sys, time
from pathlib import Path
import torch
from gpt.configs.train_config import TrainConfig
from gpt.run import open_run
from gpt.pipeline import build_trainer
from gpt.training.evaluator import Evaluator
from gpt.training.events import StepEnd
from gpt.training.observer import Observer

def read(path):
    return TrainConfig.model_validate_json(Path(path).read_text())

class Slow:
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

layout = open_run(read(sys.argv[1]))
layout.dist.on_main(lambda: time.sleep(2.5))
trainer = build_trainer(layout)
trainer.attach(Evaluator(trainer._state.model, [Slow()], layout.plan))
assert trainer.train() == "finished"
layout.dist.close()

layout = open_run(read(sys.argv[2]))
trainer = build_trainer(layout)
trainer.attach(BitFlip(trainer._state.model, layout.dist.rank))
trainer.train()
"""


def test_what_takes_longer_than_a_step_may_does_not_end_the_run_and_a_flipped_bit_does(runs: Runs) -> None:
    """An evaluation and what rank 0 does alone, then one bit of one weight on rank 1."""
    script = runs.path("script.py")
    script.write_text(SCRIPT)
    lax = runs.write("evaluated", max_steps=4, eval={"interval": 2}, parallel={"step_timeout": 1})
    flipped = runs.write("flipped", max_steps=40, checkpoint={"interval": 4}, parallel={"check_replicas": 5})
    with launched(script, lax, flipped) as launch:
        assert launch.end() != 0
    assert len(logged_losses(runs.path("evaluated"))) == 4, launch.output
    assert "UserError: the weights of rank 1 differ from those of rank 0 after step 8" in launch.output
    committed = RunFolder(runs.path("flipped")).list_checkpoints()
    assert [checkpoint.name for checkpoint in committed] == ["step_00000004"]
    verify(committed[0])


STALE = """
import ctypes, os, shutil, subprocess, sys
from pathlib import Path
from gpt.configs.train_config import TrainConfig
from gpt.run import open_run
from gpt.pipeline import build_trainer
from gpt.utils.launch import end_process

config = TrainConfig.model_validate_json(Path(sys.argv[1]).read_text())
folder, stale = config.run_dir / "checkpoints", Path(sys.argv[2])
if os.environ["RANK"] == "0":
    assert ctypes.CDLL(None).unshare(0x00020000) == 0  # CLONE_NEWNS: mounts of its own
    subprocess.run(["mount", "--make-rprivate", "/"], check=True)
    subprocess.run(["mount", "--bind", stale, folder], check=True)
layout = open_run(config)
assert layout.start.checkpoint == folder / "step_00000004", layout.start.checkpoint
build_trainer(layout).train()
layout.dist.close()
end_process()
"""


def test_where_ranks_see_different_checkpoints_rank_0_decides(runs: Runs) -> None:
    """As over a network's file system: rank 0 does not see yet what rank 1 sees."""
    if os.geteuid() != 0:
        pytest.skip("mounting needs root")
    script, stale = runs.path("stale.py"), runs.path("stale")
    script.write_text(STALE)
    config = runs.write("seen", max_steps=8, checkpoint={"interval": 4})
    with launched(MAIN, "train", "--config", config) as launch:
        assert launch.end() == 0, launch.output
    shutil.copytree(runs.path("seen") / "checkpoints" / "step_00000004", stale / "step_00000004")
    expected = logged_losses(runs.path("seen"))
    with launched(script, config, stale) as launch:
        assert launch.end() == 0, launch.output
    assert logged_losses(runs.path("seen")) == expected
    newest = "step_00000008/model.safetensors"
    assert (stale / newest).read_bytes() == (runs.path("seen") / "checkpoints" / newest).read_bytes()
