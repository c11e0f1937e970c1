"""Rollbacks of runs that are stopped, resumed and saved at other moments, compared with an undisturbed run."""

import random
import shutil
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest

from gpt.checkpoint.run_folder import RunFolder
from gpt.configs.train_config import TrainConfig
from gpt.training.events import Command, Event, RolledBack, Save, StepEnd, Stop
from gpt.training.observer import Observer
from tests.conftest import LossRecorder
from tests.faults.test_numerics import SETTINGS, build_trainer_on_bad_data, read_final_state

pytestmark = pytest.mark.faults

Configure = Callable[..., TrainConfig]
BAD_BATCHES = (14, 23, 24, 26, 37)
"""Global batches with ten times their loss: alone, next to each other, and within one report."""
LAST_STEP = 40
SPIKE = {"window": 16, "rollback": True, "max_rollbacks": 20}


class RandomCommands(Observer):
    """Stops and saves at random steps, as signals and the clock do."""

    def __init__(self, seed: int):
        self._draw = random.Random(seed)

    def on_event(self, event: Event) -> Iterable[Command]:
        if isinstance(event, StepEnd):
            number = self._draw.random()
            if number < 0.12:
                return [Stop("SIGTERM")]
            if number < 0.4:
                return [Save()]
        return ()


def configure(tiny: Configure, run_dir: Path, **changes: Any) -> TrainConfig:
    settings = SETTINGS | {"max_steps": LAST_STEP, "spike": SPIKE, "eval": {"interval": 7}} | changes
    return tiny(run_dir, **settings)


def train(config: TrainConfig, *observers: Observer) -> str:
    trainer = build_trainer_on_bad_data(config, *BAD_BATCHES)
    for observer in observers:
        trainer.attach(observer)
    return trainer.train()


@pytest.fixture(scope="module")
def reference(tiny: Configure, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Train a run that meets several spikes, and return its folder."""
    run_dir = tmp_path_factory.mktemp("rollbacks") / "run"
    recorder = LossRecorder()
    train(configure(tiny, run_dir), recorder)
    targets = [event.to_step for event in recorder.events if isinstance(event, RolledBack)]
    assert len(targets) == len(BAD_BATCHES)
    assert set(targets) == {10, 20, 30}
    return run_dir


def assert_same(run_dir: Path, reference: Path) -> None:
    assert (run_dir / "journal.jsonl").read_text() == (reference / "journal.jsonl").read_text()
    assert read_final_state(run_dir, LAST_STEP) == read_final_state(reference, LAST_STEP)


@pytest.mark.parametrize("seed", range(12))
def test_stops_and_saves_around_rollbacks_change_no_bit(
    seed: int, reference: Path, tiny: Configure, tmp_path: Path
) -> None:
    draw, reasons = random.Random(seed), ["SIGTERM"]
    checkpoint = {"interval": 10, "keep": draw.choice([1, 2, 3]), "keep_best": draw.random() < 0.5}
    while reasons[-1] == "SIGTERM":
        log = {"interval": draw.choice([1, 2, 3, 7, 50])}
        config = configure(tiny, tmp_path / "run", log=log, checkpoint=checkpoint)
        reasons.append(train(config, RandomCommands(draw.randrange(2**32))))
    assert len(reasons) > 2
    assert_same(tmp_path / "run", reference)


def test_extended_run_rolls_back_like_the_longer_run(reference: Path, tiny: Configure, tmp_path: Path) -> None:
    for max_steps in (23, 25, 27, LAST_STEP):  # a run's last step is saved, and is no step of the schedule
        train(configure(tiny, tmp_path / "run", max_steps=max_steps))
    assert_same(tmp_path / "run", reference)


def test_fork_rolls_back_to_its_origin_or_its_schedule_whatever_else_is_saved(
    reference: Path, tiny: Configure, tmp_path: Path
) -> None:
    origin = tmp_path / "origin"
    train(configure(tiny, origin, max_steps=13))
    checkpoint = str(RunFolder(origin).checkpoint_path(13))
    forks = tmp_path / "left-alone", tmp_path / "interrupted"
    recorder = LossRecorder()
    train(configure(tiny, forks[0], resume=checkpoint), recorder)
    assert next(event.to_step for event in recorder.events if isinstance(event, RolledBack)) == 13
    seed = 0
    while train(configure(tiny, forks[1], resume=checkpoint), RandomCommands(seed)) == "SIGTERM":
        seed += 1
    assert seed > 0
    assert_same(forks[1], forks[0])


def test_damaged_target_is_replaced_by_the_target_before_it(tiny: Configure, tmp_path: Path) -> None:
    class Damage(LossRecorder):
        def on_event(self, event: Any) -> Iterable[Command]:  # type: ignore[override]
            super().on_event(event)
            if isinstance(event, StepEnd) and event.step == 22:
                (tmp_path / "checkpoints/step_00000020/progress.json").write_text("{}")
                return [Save()]
            return ()

    recorder = Damage()
    checkpoint = {"interval": 10, "keep": 0, "asynchronous": False}
    trainer = build_trainer_on_bad_data(configure(tiny, tmp_path, checkpoint=checkpoint, log={"interval": 1}), 23)
    trainer.attach(recorder)
    trainer.train()
    assert [event.to_step for event in recorder.events if isinstance(event, RolledBack)] == [10]
    shutil.rmtree(tmp_path)
