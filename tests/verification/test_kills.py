import json
import os
from collections import Counter
from pathlib import Path

import pytest

from gpt.checkpoint.run_folder import RunFolder
from gpt.errors import UserError
from gpt.verification.kills import (
    KillRecord,
    Place,
    PlannedKill,
    RunOutline,
    Timings,
    _is_due,
    _place,
    kill_and_resume,
    plan_kills,
)
from gpt.verification.lives import launcher_for
from gpt.verification.watch import RunStatus, Watch

COURSE = RunOutline(0, 100, 10, frozenset(range(10, 101, 10)), frozenset({33, 66, 99}))


def sight(
    step: int = 50, *, begun: bool = True, evaluated: int = 40, saving: bool = False, committed: int = 40
) -> RunStatus:
    return RunStatus(begun, step, evaluated, saving, committed)


def test_a_seed_decides_the_aims_and_half_of_them_wait_for_nothing() -> None:
    aims = plan_kills(3, 100, COURSE)
    assert aims == plan_kills(3, 100, COURSE)
    assert aims != plan_kills(4, 100, COURSE)
    assert Counter(aim.place for aim in aims)[Place.STEP] == 50
    assert {aim.place for aim in aims} == set(Place)
    steps = [aim.step for aim in aims]
    assert steps == sorted(steps)
    assert 80 < steps[-1] < COURSE.closing == 90
    one_save = RunOutline(0, 100, 0, frozenset(), frozenset())
    assert 90 < plan_kills(3, 100, one_save)[-1].step < 100
    assert Place.EPOCH not in {
        aim.place for aim in plan_kills(3, 100, RunOutline(0, 100, 10, frozenset(), frozenset()))
    }


@pytest.mark.parametrize(
    ("place", "seen", "due"),
    [
        (Place.START_UP, sight(begun=False), True),
        (Place.STEP, sight(begun=False), False),
        (Place.STEP, sight(), True),
        (Place.STEP, sight(9), False),
        (Place.SAVE, sight(), False),
        (Place.SAVE, sight(saving=True), True),
        (Place.EVALUATION, sight(49), False),
        (Place.EVALUATION, sight(), True),
        (Place.EVALUATION, sight(evaluated=50), False),
        (Place.EPOCH, sight(), False),
        (Place.EPOCH, sight(65), True),
        (Place.SAVE, sight(95), True),  # what it waits for may not come before the end
    ],
)
def test_a_kill_waits_for_its_place(place: Place, seen: RunStatus, due: bool) -> None:
    assert _is_due(PlannedKill(place, 20.5, 0.5), seen, COURSE, None) is due


def test_after_lives_that_saved_nothing_a_kill_waits_for_a_checkpoint_but_not_beyond_the_end() -> None:
    aim = PlannedKill(Place.STEP, 20.5, 0.5)
    assert not _is_due(aim, sight(), COURSE, saved_at=40)
    assert _is_due(aim, sight(committed=50), COURSE, saved_at=40)
    assert _is_due(aim, sight(95), COURSE, saved_at=40)
    assert _is_due(aim, sight(30, committed=0), RunOutline(0, 100, 0, frozenset(), frozenset()), saved_at=0)


@pytest.mark.parametrize(
    ("seen", "place"),
    [
        (sight(saving=True), Place.SAVE),
        (sight(40), Place.START_UP),
        (sight(0, begun=False), Place.START_UP),
        (sight(), Place.EVALUATION),
        (sight(51), Place.STEP),
        (sight(66), Place.EPOCH),
    ],
)
def test_what_a_kill_hit_is_told_from_what_it_left(seen: RunStatus, place: Place) -> None:
    assert _place(seen, COURSE, resumed_at=40) is place


def test_lost_are_the_steps_since_the_checkpoint() -> None:
    assert KillRecord(Place.STEP, 47, 40).lost == 7
    assert KillRecord(Place.START_UP, 0, 40).lost == 0


def test_the_pace_bounds_how_long_a_kill_waits() -> None:
    pace = Timings(3.0, 60.0, steps=[0.1, 0.2, 5.0], saves=[0.3])
    waits = {place: pace.of(place, COURSE) for place in Place}
    assert waits[Place.START_UP] == 3.0
    assert waits[Place.STEP] == pytest.approx(1.0)
    assert waits[Place.SAVE] == 0.3
    assert waits[Place.EVALUATION] == 0.2
    assert waits[Place.EPOCH] == 0.4


def test_a_life_that_fails_by_itself_is_told(tmp_path: Path) -> None:
    start, log = launcher_for(1), tmp_path / "log"
    with pytest.raises(UserError, match="ended by itself with status 2"):
        kill_and_resume(
            lambda: start(["train", "--nonsense"], log),
            RunFolder(tmp_path),
            [],
            COURSE,
            Timings(),
            lambda number, kill: None,
        )
    assert "unknown flag --nonsense" in log.read_text()


def test_a_life_that_hangs_is_killed_and_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("gpt.verification.kills.PATIENCE", 0.1)
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)  # nobody ever writes into it
    start, lives = launcher_for(1), []
    with pytest.raises(UserError, match="hangs at step 0"):
        kill_and_resume(
            lambda: lives.append(start(["train", "--config", str(pipe)], tmp_path / "log")) or lives[-1],
            RunFolder(tmp_path), [], COURSE, Timings(), lambda number, kill: None,
        )  # fmt: skip
    assert lives[0].poll() == -9


def test_the_watch_reads_a_life_from_its_own_start_on(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)

    def write(path: Path, *records: dict[str, float]) -> None:
        with path.open("a") as file:
            file.write("".join(json.dumps(record) + "\n" for record in records))

    assert Watch(folder).look() == RunStatus(False, 0, 0, False, 0)
    write(folder.lineage, {"step": 0})
    write(folder.metrics, {"step": 4, "train/loss": 1.0}, {"step": 4, "val/loss": 1.0}, {"step": 5, "train/loss": 1.0})
    (tmp_path / "checkpoints/step_00000004").mkdir(parents=True)
    (tmp_path / "checkpoints/step_00000006.damaged").mkdir()
    watch = Watch(folder)
    assert watch.look() == RunStatus(False, 0, 0, False, 4)
    kept = tmp_path / "kept"
    write(kept, {"step": 4, "train/loss": 1.0}, {"step": 4, "val/loss": 1.0})
    kept.replace(folder.metrics)
    write(folder.lineage, {"step": 4})
    (tmp_path / "checkpoints/.step_00000008.tmp").mkdir()
    assert watch.look() == RunStatus(True, 4, 4, True, 4)
    with folder.metrics.open("a") as file:
        file.write('{"step": 5, "train/loss": 1.0}\n{"step": 6, "tra')
        file.flush()
        assert watch.look().step == 5
        file.write('in/loss": 1.0}\n')
    assert watch.look().step == 6
