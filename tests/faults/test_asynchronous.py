"""Failures while a checkpoint is written in the background: a write that fails, and a second interrupt."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from gpt.checkpoint.manifest import verify
from gpt.checkpoint.run_folder import RunFolder
from gpt.configs.train_config import TrainConfig

pytestmark = pytest.mark.faults

Configure = Callable[..., TrainConfig]
REPOSITORY = Path(__file__).resolve().parents[2]
ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(REPOSITORY)}

FAILING_WRITE_SCRIPT = """
import json, os, resource, sys
from pathlib import Path
from gpt.configs.train_config import TrainConfig
from gpt.errors import UserError
from gpt.run import open_run
from gpt.pipeline import build_trainer
from gpt.training.events import StepEnd
from gpt.training.observer import Observer


class FileSizeLimiter(Observer):
    "Limit the files that rank 0 writes to 2,000 bytes after step 3."

    step = 0

    def on_event(self, event):
        if isinstance(event, StepEnd):
            self.step = event.step
            if event.step == 3 and os.environ["RANK"] == "0":
                resource.setrlimit(resource.RLIMIT_FSIZE, (2000, resource.RLIM_INFINITY))
        return ()


trainer = build_trainer(open_run(TrainConfig.model_validate_json(Path(sys.argv[1]).read_text())))
limiter = FileSizeLimiter()
trainer.attach(limiter)
try:
    trainer.train()
    message = None
except UserError as error:
    message = str(error)
Path(f"{sys.argv[1]}.{os.environ['RANK']}").write_bytes(json.dumps([limiter.step, message]).encode())
"""


def test_failed_background_save_ends_every_rank_at_the_same_step(tiny: Configure, tmp_path: Path) -> None:
    """Let the save of step 4 fail, with no later save: only the check after each step can find the failure."""
    (tmp_path / "script.py").write_text(FAILING_WRITE_SCRIPT)
    config = tiny(
        tmp_path / "run", max_steps=2000, checkpoint={"interval": 2}, eval={"interval": 0}, sample={"prompts": ()}
    )
    config = config.model_copy(update={"log": config.log.model_copy(update={"interval": 100})})
    (tmp_path / "config.json").write_text(config.model_dump_json())
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    done = subprocess.run(
        [*command, str(tmp_path / "script.py"), str(tmp_path / "config.json")],
        env=ENVIRONMENT, capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    answers = [json.loads(path.read_text()) for path in sorted(tmp_path.glob("config.json.*"))]
    assert len(answers) == 2, done.stderr
    assert answers[0] == answers[1]
    step, message = answers[0]
    assert "the checkpoint of step 4 cannot be saved: File too large; raise the limit" in message
    assert 4 <= step <= 6
    assert [path.name for path in RunFolder(tmp_path / "run").list_checkpoints()] == ["step_00000002"]
    verify(RunFolder(tmp_path / "run").checkpoint_path(2))


SLOW_WRITE_SCRIPT = """
import sys, time
from pathlib import Path
from gpt.checkpoint import manager
from gpt.main import main

write = manager.write_checkpoint


def write_slowly(path, snapshot, config_json):
    "Write a checkpoint as to a disk that takes a minute."
    if path.name != "step_00000002":
        print("writing", flush=True)
        time.sleep(60)
    write(path, snapshot, config_json)


manager.write_checkpoint = write_slowly
sys.exit(main(["train", "--config", sys.argv[1]]))
"""


def test_second_interrupt_does_not_wait_for_the_disk(tiny: Configure, tmp_path: Path) -> None:
    config = tiny(
        tmp_path / "run", max_steps=4, checkpoint={"interval": 2}, eval={"interval": 0}, sample={"prompts": ()}
    )
    (tmp_path / "config.json").write_text(config.model_dump_json())
    process = subprocess.Popen(
        [sys.executable, "-c", SLOW_WRITE_SCRIPT, str(tmp_path / "config.json")],
        env=ENVIRONMENT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    assert process.stdout
    try:
        while "writing" not in process.stdout.readline():
            assert process.poll() is None
        time.sleep(0.2)
        process.send_signal(signal.SIGINT)
        time.sleep(0.2)
        assert process.poll() is None
        process.send_signal(signal.SIGINT)
        started = time.monotonic()
        _, stderr = process.communicate(timeout=20)
    finally:
        process.kill()
    assert process.returncode == 130, stderr
    assert time.monotonic() - started < 5
    assert "Traceback" not in stderr
    assert [path.name for path in RunFolder(tmp_path / "run").list_checkpoints()] == ["step_00000002"]
    verify(RunFolder(tmp_path / "run").checkpoint_path(2))
