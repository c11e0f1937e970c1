"""Launch, kill and resume a run according to a plan, and record what each kill hit."""

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from signal import SIGKILL, Signals

from gpt.checkpoint.run_folder import RunFolder
from gpt.errors import UserError
from gpt.verification.plan import KillPhase, PlannedKill, RunOutline
from gpt.verification.processes import TrainingProcess
from gpt.verification.timings import POLL_SECONDS, Timings
from gpt.verification.watcher import RunStatus, RunWatcher

HANG_GRACE_SECONDS = 60.0
"""Seconds that a launch may take beyond ten times the reference run; after that, it is considered hung."""
MAX_LAUNCHES_WITHOUT_CHECKPOINT = 2
"""Launches in a row that may be killed before they save a checkpoint; the next one is killed only after a save."""


@dataclass(frozen=True)
class KillRecord:
    """Kill that was carried out."""

    phase: KillPhase
    step: int
    """Last step that was logged; if the launch logged none, the step that it resumed from."""
    resume_step: int
    """Step of the newest checkpoint, from which the next launch resumes."""
    signal: Signals = SIGKILL

    @property
    def lost_steps(self) -> int:
        """Steps to train again."""
        return max(0, self.step - self.resume_step)


def kill_and_resume(
    launch: Callable[[], TrainingProcess],
    folder: RunFolder,
    plan: Sequence[PlannedKill],
    outline: RunOutline,
    timings: Timings,
    report: Callable[[int, KillRecord], None],
) -> list[KillRecord]:
    """Kill one launch per planned kill, then let the last launch finish.

    Args:
        launch: starts or resumes the run.
        folder: folder of the run.
        plan: kills in order.
        outline: outline of the run.
        timings: timings of the reference run.
        report: callback for each kill, with the number of kills so far.

    Returns:
        The kills; fewer than planned if the run finished earlier.

    Raises:
        UserError: a launch exited with an error although it was not killed, or hung.
    """
    kills: list[KillRecord] = []
    launches_without_checkpoint = 0
    for planned in [*plan, None]:
        watcher = RunWatcher(folder)
        resumed_from = max(watcher.read_status().committed_step, outline.first_step)
        must_save = launches_without_checkpoint >= MAX_LAUNCHES_WITHOUT_CHECKPOINT
        process = launch()
        try:
            save_after = resumed_from if must_save else None
            _wait_until_due(process, watcher, planned, outline, timings, save_after=save_after)
            stopped_in = None
            if planned is not None and planned.signal is not SIGKILL and process.poll() is None:
                stopped_in = _classify_kill(watcher.read_status(), outline, resumed_from)
                _stop(process, planned.signal, timings)
        finally:
            process.kill()
        if (exit_status := process.poll()) == 0:
            return kills
        was_stopped = stopped_in is not None and process.was_stopped
        if planned is None or not (was_stopped or exit_status == -SIGKILL):
            raise UserError(f"the run exited with status {exit_status} although nothing killed it")
        status = watcher.read_status()
        phase = stopped_in or _classify_kill(status, outline, resumed_from)
        resume_step = max(status.committed_step, outline.first_step)
        step = status.step if status.step > resumed_from else resumed_from
        kills.append(KillRecord(phase, step, resume_step, planned.signal))
        report(len(kills), kills[-1])
        launches_without_checkpoint = 0 if resume_step > resumed_from else launches_without_checkpoint + 1
    raise AssertionError("the last launch has no planned kill, so it either finishes or raises")


def _wait_until_due(
    process: TrainingProcess,
    watcher: RunWatcher,
    planned: PlannedKill | None,
    outline: RunOutline,
    timings: Timings,
    save_after: int | None,
) -> None:
    """Wait until a launch exits or its planned kill is due.

    Args:
        process: launch to watch.
        watcher: reader of the run's status.
        planned: kill to wait for; None waits for the exit.
        outline: outline of the run.
        timings: timings of the reference run.
        save_after: step after which a checkpoint must be saved before the kill; None: no such condition.

    Raises:
        UserError: the launch hangs.
    """
    limit = HANG_GRACE_SECONDS + 10 * timings.total
    deadline = time.monotonic() + limit
    while process.poll() is None:
        status = watcher.read_status()
        if planned is not None and _is_due(planned, status, outline, save_after):
            time.sleep(planned.delay_fraction * _max_delay(planned.phase, status, outline, timings))
            return
        if time.monotonic() > deadline:
            raise UserError(f"the run hangs at step {status.step}: it has not finished within {limit:.0f} s")
        time.sleep(POLL_SECONDS)


def _stop(process: TrainingProcess, number: Signals, timings: Timings) -> None:
    """Send a signal that stops the run gracefully, and wait until it has ended.

    Raises:
        UserError: the launch does not end.
    """
    limit = HANG_GRACE_SECONDS + timings.total
    deadline = time.monotonic() + limit
    process.stop(number)
    while process.poll() is None:
        if time.monotonic() > deadline:
            raise UserError(f"the run hangs: it has not ended within {limit:.0f} s after {number.name}")
        time.sleep(POLL_SECONDS)


def _is_due(planned: PlannedKill, status: RunStatus, outline: RunOutline, save_after: int | None) -> bool:
    """Return whether the step and the phase that a planned kill waits for have been reached."""
    if planned.phase is KillPhase.START_UP:
        return True
    if not status.started:
        return False
    if status.step >= outline.last_interval_start:
        return status.step >= min(planned.step, outline.last_step - 1)
    if status.step < planned.step or (save_after is not None and status.committed_step <= save_after):
        return False
    match planned.phase:
        case KillPhase.SAVE:
            return status.saving
        case KillPhase.EVALUATION:
            return _is_evaluating(status, outline)
        case KillPhase.EPOCH_BOUNDARY:
            return status.step + 1 in outline.epoch_ends
    return True


def _max_delay(phase: KillPhase, status: RunStatus, outline: RunOutline, timings: Timings) -> float:
    """Return the longest delay, in seconds, between the moment at which a kill is due and the kill."""
    if phase is KillPhase.START_UP:
        return timings.start_up
    if status.step >= outline.last_interval_start:
        return timings.median_step
    match phase:
        case KillPhase.SAVE:
            return statistics.median(timings.saves or [timings.median_step])
        case KillPhase.EVALUATION:
            return statistics.median(timings.evaluations or [timings.median_step])
        case KillPhase.EPOCH_BOUNDARY:
            return 2 * timings.median_step
    return timings.median_step * max(1.0, outline.checkpoint_interval / 2)


def _classify_kill(status: RunStatus, outline: RunOutline, resumed_from: int) -> KillPhase:
    """Return the phase that a kill hit, according to the files that it left behind."""
    if status.saving:
        return KillPhase.SAVE
    if status.step <= resumed_from:  # this launch has not logged a step
        return KillPhase.START_UP
    if _is_evaluating(status, outline):
        return KillPhase.EVALUATION
    if {status.step, status.step + 1} & outline.epoch_ends:
        return KillPhase.EPOCH_BOUNDARY
    return KillPhase.STEP


def _is_evaluating(status: RunStatus, outline: RunOutline) -> bool:
    """Return whether the last logged step is one to evaluate, and its evaluation is not logged yet."""
    return status.step in outline.evaluated_steps and status.evaluated_step < status.step
