"""Ranks that hang: stopped, or blocked in C; heartbeats name them, and only them."""

import contextlib
import os
import re
import signal
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from gpt.configs.train_config import TrainConfig
from tests.distributed.test_torchrun import start_torchrun

HANGING_SCRIPT = """
import ctypes, os, signal, sys, time
from gpt.main import program
from gpt.training.train_step import TrainStep

rank, faults, sys.argv = os.environ["RANK"], dict(item.split("=") for item in sys.argv[1].split(",")), sys.argv[1:]
train = TrainStep.__call__

def hang(self, step, probes=()):
    if step == 2:
        print(f"process {os.getpid()} hangs at {time.monotonic()}", flush=True)
        if faults.get(rank) == "stopped":
            os.kill(os.getpid(), signal.SIGSTOP)
        elif faults.get(rank) == "blocked":
            with self._timer.phase("data"):
                ctypes.CDLL(None).sleep(1000)
    return train(self, step, probes)

TrainStep.__call__ = hang
program()
"""
MAX_DELAY_SECONDS = 5
"""Time after the timeout in which a rank is named and the run ends."""
PLACE = r"waits in step 3 at gpt/training/trainer\.py:\d+"


@pytest.mark.parametrize(
    ("faults", "timeout", "message"),
    [
        (
            *("0=blocked,1=stopped", 10),
            r"rank 1 took no part in a step for 10 s \(--parallel\.step-timeout\); rank 1: the process is stopped, or "
            rf"its machine is gone; rank 0 {PLACE}",
        ),
        ("0=blocked", 2, rf"rank 0 took no part in a step for 2 s \(--parallel\.step-timeout\); rank 0 {PLACE}"),
        (
            *("0=blocked,1=blocked", 2),
            rf"rank 0 and rank 1 took no part in a step for 2 s \(--parallel\.step-timeout\); rank 0 {PLACE}; "
            rf"rank 1 {PLACE}",
        ),
    ],
)
def test_hung_ranks_are_named_though_no_main_thread_can(
    faults: str, timeout: int, message: str, tiny: Callable[..., TrainConfig], tmp_path: Path
) -> None:
    (tmp_path / "script.py").write_text(HANGING_SCRIPT)
    config = tiny(tmp_path / "run", parallel={"step_timeout": timeout})
    (tmp_path / "config.json").write_text(config.model_dump_json())
    process = start_torchrun(faults, "train", "--config", str(tmp_path / "config.json"), script=tmp_path / "script.py")
    began, pids, lines, seconds = 0.0, list[int](), list[str](), dict[str, float]()
    try:
        assert process.stdout is not None
        for text in process.stdout:
            lines.append(text)
            if hangs := re.search(r"process (\d+) hangs at ([\d.]+)", text):
                pids.append(int(hangs[1]))
                began = float(hangs[2])
            if "gpt: error" in text:
                seconds.setdefault("named", time.monotonic() - began)
            if "closing signal SIGTERM" in text or "(exitcode: 2)" in text:
                seconds.setdefault("ended", time.monotonic() - began)
                kill_processes(*pids)  # torchrun kills a stopped rank half a minute later
    finally:
        kill_processes(*pids, process.pid)
        process.communicate(timeout=30)
    output = "".join(lines)
    assert len(re.findall(f"gpt: error: {message}; the same command resumes", output)) == 1, output
    assert output.count("gpt: error: ") == 1, output
    assert "(exitcode: 2)" in output, output
    assert timeout < seconds["named"] <= seconds["ended"] < timeout + MAX_DELAY_SECONDS


def kill_processes(*pids: int) -> None:
    for pid in pids:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)


LONG_WORK_SCRIPT = """
import os, sys, time
from torch import nn
from gpt import pipeline
from gpt.checkpoint.manager import CheckpointManager
from gpt.data import corpus
from gpt.evaluation.val_loss import ValLoss
from gpt.main import program

def slow_down(owner, name, seconds):
    work = getattr(owner, name)

    def work_slowly(*arguments):
        time.sleep(seconds)
        return work(*arguments)

    setattr(owner, name, work_slowly)

slow_down(corpus, "prepare_corpus", 10)  # on rank 0 alone
slow_down(ValLoss, "run", 8)
slow_down(CheckpointManager, "_commit", 8)  # on rank 0 alone
nn.Module.compile = lambda *arguments, **options: None  # only the trial takes long
if os.environ["RANK"] == "0":
    slow_down(pipeline, "compile_or_fall_back", 8)
program()
"""


def test_preparation_compilation_evaluation_and_save_beyond_every_limit_are_no_hangs(
    tiny: Callable[..., TrainConfig], tmp_path: Path
) -> None:
    """Work for 8 s in training, where a rank is stalled after 3 s and silent after 7 s; for 10 s (8 s) before it."""
    (tmp_path / "script.py").write_text(LONG_WORK_SCRIPT)
    config = tiny(
        tmp_path / "run",
        max_steps=2,
        compile="on",
        eval={"interval": 2},
        checkpoint={"interval": 2, "asynchronous": False},
        parallel={"step_timeout": 1, "start_timeout": 6},
    )
    (tmp_path / "config.json").write_text(config.model_dump_json())
    process = start_torchrun("train", "--config", str(tmp_path / "config.json"), script=tmp_path / "script.py")
    output, _ = process.communicate(timeout=120)
    assert process.returncode == 0, output
    assert "finished at step 2" in output
