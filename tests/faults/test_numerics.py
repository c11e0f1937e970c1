"""Numbers that are not finite, and spikes: injected in one process and in one of two."""

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
GARBLED = 24
"""The global batch whose loss is ten times as large: that of step 25."""
SETTINGS: dict[str, Any] = {
    "max_steps": 30,
    "micro_batch_size": 8,
    "model": {"dropout": 0.1},
    "checkpoint": {"interval": 10},
    "log": {"interval": 3},
    "eval": {"interval": 0},
}


def garbled(config: TrainConfig, *batches: int, factor: float = 10.0) -> Trainer:
    """A run on data of which some global batches are so bad that their loss is `factor` times what it would be."""
    trainer = build_trainer(open_run(config))
    rows = {tuple(trainer._train_step._loader._fetch(batch).tensors[0][0].tolist()) for batch in batches}

    def spoil(_: object, args: tuple[torch.Tensor, ...], loss: torch.Tensor) -> torch.Tensor:
        return loss * factor if tuple(args[0][0].tolist()) in rows else loss

    trainer._state.model.register_forward_hook(spoil)
    return trainer


def final(run_dir: Path, step: int = 30) -> dict[str, bytes]:
    checkpoint = RunFolder(run_dir).checkpoint_path(step)
    verify(checkpoint)
    return {
        name: (checkpoint / name).read_bytes()
        for name in ("model.safetensors", "optimizer.safetensors", "progress.json")
    }


def losses(run_dir: Path) -> dict[int, float]:
    lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    records = [record for record in lines if "train/loss" in record]
    assert [record["step"] for record in records] == sorted({record["step"] for record in records})
    return {record["step"]: record["train/loss"] for record in records}


@pytest.fixture(scope="module")
def rolled_back(tiny: Configure, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[object]]:
    """A run that met a spike, and what its observers saw."""
    run_dir = tmp_path_factory.mktemp("spikes") / "run"
    trainer, recorder = (
        garbled(tiny(run_dir, spike={"window": 16, "rollback": True}, **SETTINGS), GARBLED),
        LossRecorder(),
    )
    trainer.attach(recorder)
    assert trainer.train() == "finished"
    return run_dir, recorder.events


def test_a_spike_is_logged_and_the_run_goes_on_without_it(rolled_back: tuple[Path, list[object]]) -> None:
    run_dir, events = rolled_back
    (spike,) = (event for event in events if isinstance(event, SpikeSeen))
    assert spike.step == GARBLED + 1
    assert spike.loss > 5 * spike.median
    (back,) = (event for event in events if isinstance(event, RolledBack))
    assert (back.step, back.to_step) == (27, 20)  # the report in which the spike was seen, the checkpoint before it
    (record,) = (json.loads(line) for line in (run_dir / "journal.jsonl").read_text().splitlines())
    assert record["quarantined"] == {"24": f"spike: loss {spike.loss:.4f}"}
    assert record["to_step"] == 20
    assert max(losses(run_dir).values()) < 7


def test_a_replay_of_the_journal_is_exact(
    rolled_back: tuple[Path, list[object]], tiny: Configure, tmp_path: Path
) -> None:
    run_dir, _ = rolled_back
    spike = {"window": 16, "journal": run_dir / "journal.jsonl"}
    recorder, trainer = LossRecorder(), garbled(tiny(tmp_path / "run", spike=spike, **SETTINGS), GARBLED)
    trainer.attach(recorder)
    trainer.train()
    assert not [event for event in recorder.events if isinstance(event, SpikeSeen | RolledBack)]
    assert final(tmp_path / "run") == final(run_dir)
    assert losses(tmp_path / "run") == losses(run_dir)
    assert recorder.losses[: GARBLED + 1] != recorder.losses[:GARBLED]
    longer = SETTINGS | {"max_steps": 33}  # the journal is the run's own now
    build_trainer(open_run(tiny(tmp_path / "run", spike={"window": 16}, **longer))).train()
    shutil.copytree(run_dir, tmp_path / "copy")
    build_trainer(open_run(tiny(tmp_path / "copy", spike={"window": 16}, **longer))).train()
    assert final(tmp_path / "run", 33) == final(tmp_path / "copy", 33)


def killed_at(owner: type, name: str, *, after: bool) -> Callable[[pytest.MonkeyPatch, Trainer], None]:
    """SIGKILL before or after a method is called."""

    def arrange(patch: pytest.MonkeyPatch, trainer: Trainer) -> None:
        plain = getattr(owner, name)

        def deadly(*args: Any, **kwargs: Any) -> None:
            if after:
                plain(*args, **kwargs)
            os.kill(os.getpid(), signal.SIGKILL)

        patch.setattr(owner, name, deadly)

    return arrange


def killed_on(matches: Callable[[object], bool]) -> Callable[[pytest.MonkeyPatch, Trainer], None]:
    """SIGKILL when an event is seen."""

    class Deadly(LossRecorder):
        def on_event(self, event: Any) -> tuple[()]:
            if matches(event) and any(isinstance(seen, RolledBack) for seen in [*self.events, event]):
                os.kill(os.getpid(), signal.SIGKILL)
            return super().on_event(event)

    return lambda patch, trainer: trainer.attach(Deadly())


POINTS = {
    "going back": killed_at(CheckpointManager, "load_newest", after=True),
    "before the journal": killed_at(Journal, "add_rollback", after=False),
    "after the journal": killed_at(Journal, "add_rollback", after=True),
    "when all is done": killed_on(lambda event: isinstance(event, RolledBack)),
    "training again": killed_on(lambda event: isinstance(event, StepEnd) and event.step == 24),
    "past the spike": killed_on(lambda event: isinstance(event, StepEnd) and event.step == 28),
}


@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
@pytest.mark.parametrize("point", POINTS)
def test_a_kill_around_a_rollback_changes_no_bit(
    point: str, rolled_back: tuple[Path, list[object]], tiny: Configure, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = tiny(tmp_path / "run", spike={"window": 16, "rollback": True}, **SETTINGS)
    child = os.fork()
    if not child:
        try:
            trainer = garbled(config, GARBLED)
            POINTS[point](monkeypatch, trainer)
            trainer.train()
        finally:
            os._exit(1)  # it should have been killed
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
    garbled(config, GARBLED).train()
    assert final(tmp_path / "run") == final(rolled_back[0])
    assert losses(tmp_path / "run") == losses(rolled_back[0])
    assert (tmp_path / "run/journal.jsonl").read_bytes() == (rolled_back[0] / "journal.jsonl").read_bytes()


def test_without_rollback_a_spike_is_only_logged(tiny: Configure, tmp_path: Path) -> None:
    garbled(tiny(tmp_path, spike={"window": 16}, **SETTINGS), GARBLED).train()
    records = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    (spike,) = (record for record in records if "spike/loss" in record)
    assert spike["step"] == GARBLED + 1
    assert spike["spike/loss"] > 5 * spike["spike/median"]
    assert not (tmp_path / "journal.jsonl").exists()


def test_a_run_goes_back_from_data_that_stay_bad_only_so_often(tiny: Configure, tmp_path: Path) -> None:
    config = tiny(tmp_path, spike={"window": 16, "rollback": True, "max_rollbacks": 2}, **SETTINGS)
    with pytest.raises(UserError, match=r"went back 2 times already"):
        garbled(config, *range(GARBLED, 40)).train()
    (last,) = RunFolder(tmp_path).list_checkpoints()[-1:]
    verify(last)
    assert last.name == "step_00000020"


def test_a_spike_before_the_first_checkpoint_goes_back_to_the_start(tiny: Configure, tmp_path: Path) -> None:
    recorder = LossRecorder()
    trainer = garbled(tiny(tmp_path, spike={"window": 16, "rollback": True}, **SETTINGS), 7)
    trainer.attach(recorder)
    trainer.train()
    assert [event.to_step for event in recorder.events if isinstance(event, RolledBack)] == [0]
    spike = {"window": 16, "journal": tmp_path / "journal.jsonl"}
    garbled(tiny(tmp_path / "replay", spike=spike, **SETTINGS), 7).train()
    assert final(tmp_path / "replay") == final(tmp_path)


def test_skips_in_a_row_end_the_run_with_the_last_commit_intact(tiny: Configure, tmp_path: Path) -> None:
    config = tiny(tmp_path, spike={"max_skips": 4}, **SETTINGS)
    with pytest.raises(UserError) as failure:
        garbled(config, 3, *range(22, 30), factor=float("nan")).train()
    message = str(failure.value)
    assert message.startswith("step 26: ")
    assert "text: train-000000.safetensors document 0, tokens " in message
    assert "\n" not in message
    last = RunFolder(tmp_path).list_checkpoints()[-1]
    verify(last)
    assert (last.name, read_json(last / "progress.json")["skipped_updates"]) == ("step_00000020", 1)
    build_trainer(open_run(config)).train()  # on sound data
    assert read_json(RunFolder(tmp_path).list_checkpoints()[-1] / "progress.json")["skipped_updates"] == 1


def test_the_end_for_too_many_skips_is_one_line_and_exit_status_2(
    tiny: Configure, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    plain = GPT.forward
    monkeypatch.setattr(GPT, "forward", lambda *args, **kwargs: plain(*args, **kwargs) * float("nan"))
    config = tiny(tmp_path / "run", **SETTINGS)
    (tmp_path / "config.json").write_text(config.model_dump_json())
    assert main(["train", "--config", str(tmp_path / "config.json")]) == 2
    output, error = capfd.readouterr()
    assert error.startswith("gpt: error: step 10: the loss or gradient of the last 10 steps was not finite")
    assert error.count("\n") == 1
    assert "step 4, 5, 6: 3 updates skipped: a NaN or inf in the loss or gradient" in output.splitlines()
    assert not RunFolder(tmp_path / "run").list_checkpoints()


TWO_PROCESSES = """
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
layout = open_run(TrainConfig.model_validate_json((folder / "config.json").read_text()))
trainer = build_trainer(layout)
model, optimizer = trainer._state.model, trainer._state.optimizer
seen = {"digests": [], "back": [], "spikes": [], "error": None}

def spoil(_, args, loss):
    found = faults.get(batches.get(tuple(args[0][0].tolist())), "")
    if found == "nan gradient":
        handles.append(model.wpe.weight.register_hook(lambda gradient: gradient * math.nan))
    return loss * {"nan loss": math.nan, "spike": 10}.get(found, 1) + (math.inf if found == "inf loss" else 0)

class Watcher(Observer):
    def on_event(self, event):
        if isinstance(event, StepEnd):
            while handles:
                handles.pop().remove()
            digest = hashlib.sha256()
            for p in model.parameters():
                for tensor in (p.detach(), *optimizer.state[p].values()):
                    digest.update(tensor.numpy().tobytes())
            seen["digests"].append(digest.hexdigest())
        if isinstance(event, RolledBack):
            seen["back"].append([event.step, event.to_step])
        if isinstance(event, SpikeSeen):
            seen["spikes"].append(event.step)
        return ()
    def close(self, error):
        seen["error"] = str(error)

handles = []
batches = {tuple(trainer._train_step._loader._fetch(int(batch)).tensors[0][0].tolist()): batch for batch in faults}
if layout.dist.rank == 1:
    model.register_forward_hook(spoil)
trainer.attach(Watcher())
try:
    trainer.train()
except UserError:
    pass
(folder / f"seen.{layout.dist.rank}").write_text(json.dumps(seen))
layout.dist.close()
end_process()
"""


def on_two_processes(folder: Path, config: TrainConfig, faults: dict[int, str]) -> list[dict[str, Any]]:
    """What each of two processes saw of a run in which the second one has faults in some global batches."""
    (folder / "script.py").write_text(TWO_PROCESSES)
    (folder / "config.json").write_text(config.model_dump_json())
    subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2",
         str(folder / "script.py"), str(folder), json.dumps(faults)],
        env=os.environ | {"OMP_NUM_THREADS": "1"}, check=True, timeout=120,
    )  # fmt: skip
    return [json.loads((folder / f"seen.{rank}").read_text()) for rank in (0, 1)]


def test_a_fault_on_one_process_skips_the_update_of_both(tiny: Configure, tmp_path: Path) -> None:
    faults = {3: "nan loss", 6: "nan gradient", 9: "inf loss"} | dict.fromkeys(range(12, 30), "nan gradient")
    config = tiny(tmp_path / "run", spike={"max_skips": 3}, **SETTINGS | {"micro_batch_size": 4})
    first, second = on_two_processes(tmp_path, config, faults)
    assert first == second
    digests = first["digests"]
    unchanged = [batch for batch in range(1, len(digests)) if digests[batch] == digests[batch - 1]]
    assert unchanged == [3, 6, 9, 12, 13]  # the run ends before the last one is told of
    assert first["error"].startswith("step 15: the loss or gradient of the last 3 steps was not finite")
    assert "text: train-000000.safetensors document 0" in first["error"]
    (checkpoint,) = RunFolder(tmp_path / "run").list_checkpoints()
    verify(checkpoint)
    assert read_json(checkpoint / "progress.json")["skipped_updates"] == 3


def test_two_processes_roll_back_and_replay_together(tiny: Configure, tmp_path: Path) -> None:
    spiked, replayed = tmp_path / "spiked", tmp_path / "replayed"
    settings = SETTINGS | {"max_steps": 20, "micro_batch_size": 4}
    for folder, spike in (
        (spiked, {"window": 16, "rollback": True}),
        (replayed, {"window": 16, "journal": spiked / "run/journal.jsonl"}),
    ):
        folder.mkdir()
        first, second = on_two_processes(folder, tiny(folder / "run", spike=spike, **settings), {13: "spike"})
        assert first == second
        assert (first["back"], first["spikes"]) == (([[15, 10]], [14]) if folder == spiked else ([], []))
    assert final(spiked / "run", 20) == final(replayed / "run", 20)
    assert losses(spiked / "run") == losses(replayed / "run")


def test_a_fork_leaves_out_what_its_origin_left_out(
    rolled_back: tuple[Path, list[object]], tiny: Configure, tmp_path: Path
) -> None:
    origin = RunFolder(rolled_back[0]).checkpoint_path(20)
    garbled(tiny(tmp_path / "fork", resume=str(origin), spike={"window": 16}, **SETTINGS), GARBLED).train()
    assert final(tmp_path / "fork") == final(rolled_back[0])


def test_a_run_whose_checkpoints_are_all_gone_says_so(tiny: Configure, tmp_path: Path) -> None:
    class Removing(LossRecorder):
        def on_event(self, event: Any) -> tuple[()]:
            if isinstance(event, SpikeSeen):
                shutil.rmtree(tmp_path / "checkpoints")
            return super().on_event(event)

    trainer = garbled(tiny(tmp_path, spike={"window": 16, "rollback": True}, **SETTINGS), GARBLED)
    trainer.attach(Removing())
    with pytest.raises(UserError, match="there is no sound checkpoint up to step 24 to go back to"):
        trainer.train()


def test_a_journal_that_cannot_be_followed_is_refused_at_once(
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
