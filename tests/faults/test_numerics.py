"""Non-finite losses and gradients, and loss spikes, injected into one process and into one of two ranks."""

import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from gpt.checkpoint.manager import CheckpointManager
from gpt.checkpoint.manifest import verify
from gpt.checkpoint.run_folder import RunFolder
from gpt.configs.train_config import TrainConfig
from gpt.errors import UserError
from gpt.main import main
from gpt.models.gpt import GPT
from gpt.pipeline import build_trainer
from gpt.resume.journal import Journal
from gpt.run import open_run
from gpt.training.events import RolledBack, SpikeSeen, StepEnd
from gpt.training.trainer import Trainer
from gpt.utils.atomic_io import read_json
from tests.conftest import LossRecorder

pytestmark = pytest.mark.faults

Configure = Callable[..., TrainConfig]
BAD_BATCH = 24
"""Index of the global batch whose loss is multiplied by ten; step 25 trains on it."""
SETTINGS: dict[str, Any] = {
    "max_steps": 30,
    "micro_batch_size": 8,
    "model": {"dropout": 0.1},
    "checkpoint": {"interval": 10},
    "log": {"interval": 3},
    "eval": {"interval": 0},
}


def build_trainer_on_bad_data(config: TrainConfig, *batches: int, factor: float = 10.0) -> Trainer:
    """Build a trainer on data in which some global batches have `factor` times their real loss."""
    trainer = build_trainer(open_run(config))
    rows = {tuple(trainer._train_step._loader._fetch(batch).tensors[0][0].tolist()) for batch in batches}

    def scale_loss(_: object, args: tuple[torch.Tensor, ...], loss: torch.Tensor) -> torch.Tensor:
        return loss * factor if tuple(args[0][0].tolist()) in rows else loss

    trainer._state.model.register_forward_hook(scale_loss)
    return trainer


def read_final_state(run_dir: Path, step: int = 30) -> dict[str, bytes]:
    checkpoint = RunFolder(run_dir).checkpoint_path(step)
    verify(checkpoint)
    return {
        name: (checkpoint / name).read_bytes()
        for name in ("model.safetensors", "optimizer.safetensors", "progress.json")
    }


def read_losses(run_dir: Path) -> dict[int, float]:
    lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    records = [record for record in lines if "train/loss" in record]
    assert [record["step"] for record in records] == sorted({record["step"] for record in records})
    return {record["step"]: record["train/loss"] for record in records}


@pytest.fixture(scope="module")
def rolled_back(tiny: Configure, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[object]]:
    """Train a run that meets a spike and rolls back, and return its folder and its events."""
    run_dir = tmp_path_factory.mktemp("spikes") / "run"
    config = tiny(run_dir, spike={"window": 16, "rollback": True}, **SETTINGS)
    trainer, recorder = build_trainer_on_bad_data(config, BAD_BATCH), LossRecorder()
    trainer.attach(recorder)
    assert trainer.train() == "finished"
    return run_dir, recorder.events


def test_spike_is_logged_and_its_batch_is_left_out_after_the_rollback(rolled_back: tuple[Path, list[object]]) -> None:
    run_dir, events = rolled_back
    (spike,) = (event for event in events if isinstance(event, SpikeSeen))
    assert spike.step == BAD_BATCH + 1
    assert spike.loss > 5 * spike.median
    (rollback,) = (event for event in events if isinstance(event, RolledBack))
    reporting_step, checkpoint_step = 27, 20
    assert (rollback.step, rollback.to_step) == (reporting_step, checkpoint_step)
    (record,) = (json.loads(line) for line in (run_dir / "journal.jsonl").read_text().splitlines())
    assert record["quarantined"] == {"24": f"spike: loss {spike.loss:.4f}"}
    assert record["to_step"] == 20
    assert max(read_losses(run_dir).values()) < 7


def test_replay_of_the_journal_is_bit_exact(
    rolled_back: tuple[Path, list[object]], tiny: Configure, tmp_path: Path
) -> None:
    run_dir, _ = rolled_back
    spike = {"window": 16, "journal": run_dir / "journal.jsonl"}
    recorder, trainer = (
        LossRecorder(),
        build_trainer_on_bad_data(tiny(tmp_path / "run", spike=spike, **SETTINGS), BAD_BATCH),
    )
    trainer.attach(recorder)
    trainer.train()
    assert not [event for event in recorder.events if isinstance(event, SpikeSeen | RolledBack)]
    assert read_final_state(tmp_path / "run") == read_final_state(run_dir)
    assert read_losses(tmp_path / "run") == read_losses(run_dir)
    assert recorder.losses[: BAD_BATCH + 1] != recorder.losses[:BAD_BATCH]
    longer = SETTINGS | {"max_steps": 33}  # the run has its own copy of the journal now
    build_trainer(open_run(tiny(tmp_path / "run", spike={"window": 16}, **longer))).train()
    shutil.copytree(run_dir, tmp_path / "copy")
    build_trainer(open_run(tiny(tmp_path / "copy", spike={"window": 16}, **longer))).train()
    assert read_final_state(tmp_path / "run", 33) == read_final_state(tmp_path / "copy", 33)


def kill_at_call(owner: type, name: str, *, after: bool) -> Callable[[pytest.MonkeyPatch, Trainer], None]:
    """Return a function that arranges a SIGKILL before or after a method is called."""

    def arrange(patch: pytest.MonkeyPatch, trainer: Trainer) -> None:
        original = getattr(owner, name)

        def kill_process(*args: Any, **kwargs: Any) -> None:
            if after:
                original(*args, **kwargs)
            os.kill(os.getpid(), signal.SIGKILL)

        patch.setattr(owner, name, kill_process)

    return arrange


def kill_on_event(matches: Callable[[object], bool]) -> Callable[[pytest.MonkeyPatch, Trainer], None]:
    """Return a function that arranges a SIGKILL at the first matching event after a rollback."""

    class Killer(LossRecorder):
        def on_event(self, event: Any) -> tuple[()]:
            if matches(event) and any(isinstance(seen, RolledBack) for seen in [*self.events, event]):
                os.kill(os.getpid(), signal.SIGKILL)
            return super().on_event(event)

    return lambda patch, trainer: trainer.attach(Killer())


KILL_POINTS = {
    "during the rollback": kill_at_call(CheckpointManager, "load_newest", after=True),
    "before the journal": kill_at_call(Journal, "add_rollback", after=False),
    "after the journal": kill_at_call(Journal, "add_rollback", after=True),
    "after the rollback": kill_on_event(lambda event: isinstance(event, RolledBack)),
    "training again": kill_on_event(lambda event: isinstance(event, StepEnd) and event.step == 24),
    "past the spike": kill_on_event(lambda event: isinstance(event, StepEnd) and event.step == 28),
}


@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
@pytest.mark.parametrize("point", KILL_POINTS)
def test_kill_around_a_rollback_is_bit_exact_after_resume(
    point: str, rolled_back: tuple[Path, list[object]], tiny: Configure, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = tiny(tmp_path / "run", spike={"window": 16, "rollback": True}, **SETTINGS)
    child = os.fork()
    if not child:
        try:
            trainer = build_trainer_on_bad_data(config, BAD_BATCH)
            KILL_POINTS[point](monkeypatch, trainer)
            trainer.train()
        finally:
            os._exit(1)  # not reached if the kill works
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
    build_trainer_on_bad_data(config, BAD_BATCH).train()
    assert read_final_state(tmp_path / "run") == read_final_state(rolled_back[0])
    assert read_losses(tmp_path / "run") == read_losses(rolled_back[0])
    assert (tmp_path / "run/journal.jsonl").read_bytes() == (rolled_back[0] / "journal.jsonl").read_bytes()


def test_spike_is_only_logged_without_rollback(tiny: Configure, tmp_path: Path) -> None:
    build_trainer_on_bad_data(tiny(tmp_path, spike={"window": 16}, **SETTINGS), BAD_BATCH).train()
    records = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    (spike,) = (record for record in records if "spike/loss" in record)
    assert spike["step"] == BAD_BATCH + 1
    assert spike["spike/loss"] > 5 * spike["spike/median"]
    assert not (tmp_path / "journal.jsonl").exists()


def test_max_rollbacks_ends_a_run_whose_data_stay_bad(tiny: Configure, tmp_path: Path) -> None:
    config = tiny(tmp_path, spike={"window": 16, "rollback": True, "max_rollbacks": 2}, **SETTINGS)
    with pytest.raises(UserError, match=r"was rolled back 2 times before"):
        build_trainer_on_bad_data(config, *range(BAD_BATCH, 40)).train()
    (last,) = RunFolder(tmp_path).list_checkpoints()[-1:]
    verify(last)
    assert last.name == "step_00000020"


def test_spike_before_the_first_checkpoint_rolls_back_to_the_start(tiny: Configure, tmp_path: Path) -> None:
    recorder = LossRecorder()
    trainer = build_trainer_on_bad_data(tiny(tmp_path, spike={"window": 16, "rollback": True}, **SETTINGS), 7)
    trainer.attach(recorder)
    trainer.train()
    assert [event.to_step for event in recorder.events if isinstance(event, RolledBack)] == [0]
    spike = {"window": 16, "journal": tmp_path / "journal.jsonl"}
    build_trainer_on_bad_data(tiny(tmp_path / "replay", spike=spike, **SETTINGS), 7).train()
    assert read_final_state(tmp_path / "replay") == read_final_state(tmp_path)


def test_too_many_skips_in_a_row_end_the_run_with_the_last_checkpoint_valid(tiny: Configure, tmp_path: Path) -> None:
    config = tiny(tmp_path, spike={"max_skips": 4}, **SETTINGS)
    with pytest.raises(UserError) as failure:
        build_trainer_on_bad_data(config, 3, *range(22, 30), factor=float("nan")).train()
    message = str(failure.value)
    assert message.startswith("step 26: ")
    assert "text: train-000000.safetensors document 0, tokens " in message
    assert "\n" not in message
    last = RunFolder(tmp_path).list_checkpoints()[-1]
    verify(last)
    assert (last.name, read_json(last / "progress.json")["skipped_updates"]) == ("step_00000020", 1)
    build_trainer(open_run(config)).train()  # on data without bad batches
    assert read_json(RunFolder(tmp_path).list_checkpoints()[-1] / "progress.json")["skipped_updates"] == 1


def test_too_many_skips_are_one_line_and_exit_status_2(
    tiny: Configure, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    forward = GPT.forward
    monkeypatch.setattr(GPT, "forward", lambda *args, **kwargs: forward(*args, **kwargs) * float("nan"))
    config = tiny(tmp_path / "run", **SETTINGS)
    (tmp_path / "config.json").write_text(config.model_dump_json())
    assert main(["train", "--config", str(tmp_path / "config.json")]) == 2
    output, error = capfd.readouterr()
    assert error.startswith("gpt: error: step 10: the loss or gradient of the last 10 steps was not finite")
    assert error.count("\n") == 1
    assert "step 4, 5, 6: 3 updates skipped: a NaN or inf in the loss or gradient" in output.splitlines()
    assert not RunFolder(tmp_path / "run").list_checkpoints()


TWO_RANKS_SCRIPT = """
import hashlib, json, math, os, sys
from pathlib import Path
from gpt.configs.train_config import TrainConfig
from gpt.errors import UserError
from gpt.run import open_run
from gpt.pipeline import build_trainer
from gpt.training.events import RolledBack, SpikeSeen, StepEnd
from gpt.training.observer import Observer
from gpt.utils.launch import end_process

folder, faults = Path(sys.argv[1]), json.loads(sys.argv[2])
run = open_run(TrainConfig.model_validate_json((folder / "config.json").read_text()))
trainer = build_trainer(run)
model, optimizer = trainer._state.model, trainer._state.optimizer
record = {"digests": [], "rollbacks": [], "spikes": [], "error": None}

def inject_fault(_, args, loss):
    fault = faults.get(batches.get(tuple(args[0][0].tolist())), "")
    if fault == "nan gradient":
        handles.append(model.wpe.weight.register_hook(lambda gradient: gradient * math.nan))
    return loss * {"nan loss": math.nan, "spike": 10}.get(fault, 1) + (math.inf if fault == "inf loss" else 0)

class Recorder(Observer):
    def on_event(self, event):
        if isinstance(event, StepEnd):
            while handles:
                handles.pop().remove()
            digest = hashlib.sha256()
            for p in model.parameters():
                for tensor in (p.detach(), *optimizer.state[p].values()):
                    digest.update(tensor.numpy().tobytes())
            record["digests"].append(digest.hexdigest())
        if isinstance(event, RolledBack):
            record["rollbacks"].append([event.step, event.to_step])
        if isinstance(event, SpikeSeen):
            record["spikes"].append(event.step)
        return ()
    def close(self, error):
        record["error"] = str(error)

handles = []
batches = {tuple(trainer._train_step._loader._fetch(int(batch)).tensors[0][0].tolist()): batch for batch in faults}
if run.dist.rank == 1:
    model.register_forward_hook(inject_fault)
trainer.attach(Recorder())
try:
    trainer.train()
except UserError:
    pass
(folder / f"record.{run.dist.rank}").write_text(json.dumps(record))
run.dist.close()
end_process()
"""


def train_on_two_ranks(folder: Path, config: TrainConfig, faults: dict[int, str]) -> list[dict[str, Any]]:
    """Train with faults on rank 1 in some global batches, and return what each rank recorded."""
    (folder / "script.py").write_text(TWO_RANKS_SCRIPT)
    (folder / "config.json").write_text(config.model_dump_json())
    subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2",
         str(folder / "script.py"), str(folder), json.dumps(faults)],
        env=os.environ | {"OMP_NUM_THREADS": "1"}, check=True, timeout=120,
    )  # fmt: skip
    return [json.loads((folder / f"record.{rank}").read_text()) for rank in (0, 1)]


def test_fault_on_one_rank_skips_the_update_on_both(tiny: Configure, tmp_path: Path) -> None:
    faults = {3: "nan loss", 6: "nan gradient", 9: "inf loss"} | dict.fromkeys(range(12, 30), "nan gradient")
    config = tiny(tmp_path / "run", spike={"max_skips": 3}, **SETTINGS | {"micro_batch_size": 4})
    first, second = train_on_two_ranks(tmp_path, config, faults)
    assert first == second
    digests = first["digests"]
    unchanged = [batch for batch in range(1, len(digests)) if digests[batch] == digests[batch - 1]]
    assert unchanged == [3, 6, 9, 12, 13]  # the run ends at step 15, before the digest of batch 14 is recorded
    assert first["error"].startswith("step 15: the loss or gradient of the last 3 steps was not finite")
    assert "text: train-000000.safetensors document 0" in first["error"]
    (checkpoint,) = RunFolder(tmp_path / "run").list_checkpoints()
    verify(checkpoint)
    assert read_json(checkpoint / "progress.json")["skipped_updates"] == 3


def test_two_ranks_roll_back_and_replay_together(tiny: Configure, tmp_path: Path) -> None:
    spiked, replayed = tmp_path / "spiked", tmp_path / "replayed"
    settings = SETTINGS | {"max_steps": 20, "micro_batch_size": 4}
    for folder, spike in (
        (spiked, {"window": 16, "rollback": True}),
        (replayed, {"window": 16, "journal": spiked / "run/journal.jsonl"}),
    ):
        folder.mkdir()
        first, second = train_on_two_ranks(folder, tiny(folder / "run", spike=spike, **settings), {13: "spike"})
        assert first == second
        assert (first["rollbacks"], first["spikes"]) == (([[15, 10]], [14]) if folder == spiked else ([], []))
    assert read_final_state(spiked / "run", 20) == read_final_state(replayed / "run", 20)
    assert read_losses(spiked / "run") == read_losses(replayed / "run")


def test_fork_leaves_out_the_batches_that_its_origin_left_out(
    rolled_back: tuple[Path, list[object]], tiny: Configure, tmp_path: Path
) -> None:
    origin = RunFolder(rolled_back[0]).checkpoint_path(20)
    build_trainer_on_bad_data(
        tiny(tmp_path / "fork", resume=str(origin), spike={"window": 16}, **SETTINGS), BAD_BATCH
    ).train()
    assert read_final_state(tmp_path / "fork") == read_final_state(rolled_back[0])


def test_rollback_without_a_valid_checkpoint_is_one_line(tiny: Configure, tmp_path: Path) -> None:
    class CheckpointRemover(LossRecorder):
        def on_event(self, event: Any) -> tuple[()]:
            if isinstance(event, SpikeSeen):
                shutil.rmtree(tmp_path / "checkpoints")
            return super().on_event(event)

    # A save in the background might rename a folder while it is removed.
    settings = SETTINGS | {"checkpoint": {"interval": 10, "asynchronous": False}}
    trainer = build_trainer_on_bad_data(tiny(tmp_path, spike={"window": 16, "rollback": True}, **settings), BAD_BATCH)
    trainer.attach(CheckpointRemover())
    with pytest.raises(UserError, match="no valid checkpoint up to step 24 is left to roll back to"):
        trainer.train()


def test_journal_that_does_not_fit_the_run_is_refused_before_training(
    rolled_back: tuple[Path, list[object]], tiny: Configure, tmp_path: Path
) -> None:
    journal = rolled_back[0] / "journal.jsonl"
    with pytest.raises(UserError, match=r"--spike\.journal .*none\.jsonl: no such file"):
        open_run(tiny(tmp_path / "a", spike={"journal": tmp_path / "none.jsonl"}, **SETTINGS))
    with pytest.raises(UserError, match=r"journal\.jsonl, line 1: written for other batches"):
        open_run(tiny(tmp_path / "b", seed=7, spike={"journal": journal}, **SETTINGS))
    build_trainer(open_run(tiny(tmp_path / "c", **SETTINGS))).train()
    longer = SETTINGS | {"max_steps": 40}
    with pytest.raises(UserError, match=r"batch 24 was trained on before step 30; use another --run-dir"):
        open_run(tiny(tmp_path / "c", spike={"journal": journal}, **longer))


def test_data_at_follows_the_journal(
    rolled_back: tuple[Path, list[object]], capsys: pytest.CaptureFixture[str]
) -> None:
    for step, batch in ((24, 23), (25, 25), (30, 30)):
        assert main(["data-at", str(rolled_back[0]), "--step", str(step)]) == 0
        assert capsys.readouterr().out.startswith(f"step {step}: global batch {batch}, 8 sequences of 16 tokens\n")
