"""What becomes of a run whose checkpoint is still being written: a writer that fails, a user who will not wait."""

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

FAILING = """
import json, os, resource, sys
from pathlib import Path
from gpt.configs.train_config import TrainConfig
from gpt.errors import UserError
from gpt.run import open_run
from gpt.pipeline import build_trainer
from gpt.training.events import StepEnd
from gpt.training.observer import Observer


class SmallFiles(Observer):
    "From the end of step 3 on this process, if it is rank 0, may write no file of more than 2,000 bytes."

    steps = 0

    def on_event(self, event):
        if isinstance(event, StepEnd):
            self.steps = event.step
            if event.step == 3 and os.environ["RANK"] == "0":
                resource.setrlimit(resource.RLIMIT_FSIZE, (2000, resource.RLIM_INFINITY))
        return ()


trainer = build_trainer(open_run(TrainConfig.model_validate_json(Path(sys.argv[1]).read_text())))
watcher = SmallFiles()
trainer.attach(watcher)
try:
    trainer.train()
    told = None
except UserError as error:
    told = str(error)
Path(f"{sys.argv[1]}.{os.environ['RANK']}").write_bytes(json.dumps([watcher.steps, told]).encode())
"""


def test_a_writer_that_fails_is_every_ranks_failure_at_the_same_step(tiny: Configure, tmp_path: Path) -> None:
    """The save of step 4 fails; nothing else is saved, so that only the polling of the steps can tell."""
    (tmp_path / "script.py").write_text(FAILING)
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
    step, told = answers[0]
    assert "the checkpoint of step 4 cannot be saved: File too large; raise the limit" in told
    assert 4 <= step <= 6
    assert [path.name for path in RunFolder(tmp_path / "run").list_checkpoints()] == ["step_00000002"]
    verify(RunFolder(tmp_path / "run").checkpoint_path(2))


SLOW = """
import sys, time
from pathlib import Path
from gpt.checkpoint import manager
from gpt.main import main

write = manager.write_checkpoint


def slowly(path, snapshot, config_json):
    "As to a disk that takes a minute."
    if path.name != "step_00000002":
        print("writing", flush=True)
        time.sleep(60)
    write(path, snapshot, config_json)


manager.write_checkpoint = slowly
sys.exit(main(["train", "--config", sys.argv[1]]))
"""


def test_a_second_interrupt_does_not_wait_for_the_disk(tiny: Configure, tmp_path: Path) -> None:
    config = tiny(
        tmp_path / "run", max_steps=4, checkpoint={"interval": 2}, eval={"interval": 0}, sample={"prompts": ()}
    )
    (tmp_path / "config.json").write_text(config.model_dump_json())
    process = subprocess.Popen(
        [sys.executable, "-c", SLOW, str(tmp_path / "config.json")],
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
        _, told = process.communicate(timeout=20)
    finally:
        process.kill()
    assert process.returncode == 130, told
    assert time.monotonic() - started < 5
    assert "Traceback" not in told
    assert [path.name for path in RunFolder(tmp_path / "run").list_checkpoints()] == ["step_00000002"]
    verify(RunFolder(tmp_path / "run").checkpoint_path(2))
