import os
from pathlib import Path

import pytest

from gpt.checkpoint.run_folder import RunFolder
from gpt.errors import UserError
from gpt.verification.kills import KillRecord, _classify_kill, _is_due, _max_delay, kill_and_resume
from gpt.verification.plan import KillPhase, PlannedKill, RunOutline
from gpt.verification.processes import launcher_for
from gpt.verification.timings import Timings
from gpt.verification.watcher import RunStatus

OUTLINE = RunOutline(0, 100, 10, frozenset(range(10, 101, 10)), frozenset({33, 66, 99}))


def make_status(
    step: int = 50, *, started: bool = True, evaluated_step: int = 40, saving: bool = False, committed_step: int = 40
) -> RunStatus:
    return RunStatus(started, step, evaluated_step, saving, committed_step)


@pytest.mark.parametrize(
    ("phase", "status", "due"),
    [
        (KillPhase.START_UP, make_status(started=False), True),
        (KillPhase.STEP, make_status(started=False), False),
        (KillPhase.STEP, make_status(), True),
        (KillPhase.STEP, make_status(9), False),
        (KillPhase.SAVE, make_status(), False),
        (KillPhase.SAVE, make_status(saving=True), True),
        (KillPhase.EVALUATION, make_status(49), False),
        (KillPhase.EVALUATION, make_status(), True),
        (KillPhase.EVALUATION, make_status(evaluated_step=50), False),
        (KillPhase.EPOCH_BOUNDARY, make_status(), False),
        (KillPhase.EPOCH_BOUNDARY, make_status(65), True),
        (KillPhase.SAVE, make_status(95), True),  # in the last interval another save may not come before the end
    ],
)
def test_kill_waits_for_its_phase(phase: KillPhase, status: RunStatus, due: bool) -> None:
    assert _is_due(PlannedKill(phase, 20.5, 0.5), status, OUTLINE, None) is due


def test_kill_waits_for_a_save_after_launches_without_one_but_not_beyond_the_last_interval() -> None:
    planned = PlannedKill(KillPhase.STEP, 20.5, 0.5)
    assert not _is_due(planned, make_status(), OUTLINE, save_after=40)
    assert _is_due(planned, make_status(committed_step=50), OUTLINE, save_after=40)
    assert _is_due(planned, make_status(95), OUTLINE, save_after=40)
    without_interval = RunOutline(0, 100, 0, frozenset(), frozenset())
    assert _is_due(planned, make_status(30, committed_step=0), without_interval, save_after=0)


@pytest.mark.parametrize(
    ("status", "phase"),
    [
        (make_status(saving=True), KillPhase.SAVE),
        (make_status(40), KillPhase.START_UP),
        (make_status(0, started=False), KillPhase.START_UP),
        (make_status(), KillPhase.EVALUATION),
        (make_status(51), KillPhase.STEP),
        (make_status(66), KillPhase.EPOCH_BOUNDARY),
    ],
)
def test_files_left_by_a_kill_show_the_phase_it_hit(status: RunStatus, phase: KillPhase) -> None:
    assert _classify_kill(status, OUTLINE, resumed_from=40) is phase


def test_lost_steps_are_those_since_the_checkpoint() -> None:
    assert KillRecord(KillPhase.STEP, 47, 40).lost_steps == 7
    assert KillRecord(KillPhase.START_UP, 0, 40).lost_steps == 0


def test_timings_bound_the_delay_of_a_kill() -> None:
    timings = Timings(3.0, 60.0, steps=[0.1, 0.2, 5.0], saves=[0.3])
    delays = {phase: _max_delay(phase, make_status(), OUTLINE, timings) for phase in KillPhase}
    assert delays[KillPhase.START_UP] == 3.0
    assert delays[KillPhase.STEP] == pytest.approx(1.0)
    assert delays[KillPhase.SAVE] == 0.3
    assert delays[KillPhase.EVALUATION] == 0.2
    assert delays[KillPhase.EPOCH_BOUNDARY] == 0.4
    assert _max_delay(KillPhase.START_UP, make_status(95), OUTLINE, timings) == 3.0
    in_last_interval = make_status(95)  # it has no time for more than a step
    assert _max_delay(KillPhase.SAVE, in_last_interval, OUTLINE, timings) == 0.2


def test_launch_that_fails_without_a_kill_is_reported(tmp_path: Path) -> None:
    launch, log = launcher_for(1), tmp_path / "log"
    with pytest.raises(UserError, match="exited with status 2 although nothing killed it"):
        kill_and_resume(
            lambda: launch(["train", "--nonsense"], log),
            RunFolder(tmp_path),
            [],
            OUTLINE,
            Timings(),
            lambda number, kill: None,
        )
    assert "unknown flag --nonsense" in log.read_text()


def test_launch_that_hangs_is_killed_and_reported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("gpt.verification.kills.HANG_GRACE_SECONDS", 0.1)
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)  # nothing ever writes to it
    launch, processes = launcher_for(1), []
    with pytest.raises(UserError, match="hangs at step 0"):
        kill_and_resume(
            lambda: processes.append(launch(["train", "--config", str(pipe)], tmp_path / "log")) or processes[-1],
            RunFolder(tmp_path), [], OUTLINE, Timings(), lambda number, kill: None,
        )  # fmt: skip
    assert processes[0].poll() == -9
