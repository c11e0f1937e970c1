"""Durations measured in the reference run."""

import statistics
import time
from dataclasses import dataclass, field

from gpt.checkpoint.run_folder import RunFolder
from gpt.verification.processes import TrainingProcess
from gpt.verification.watcher import RunWatcher

POLL_SECONDS = 0.001
"""Interval at which a run's folder is read; a small model's checkpoint is written in a few milliseconds."""


@dataclass
class Timings:
    """Seconds that the phases of the reference run took."""

    start_up: float = 0.0
    """From the launch to the first logged step."""
    total: float = 0.0
    steps: list[float] = field(default_factory=list)
    """Between the logs of consecutive steps."""
    saves: list[float] = field(default_factory=list)
    evaluations: list[float] = field(default_factory=list)

    @property
    def median_step(self) -> float:
        """Median seconds per step, which excludes the saves and evaluations that some steps include."""
        return statistics.median(self.steps or [0.0])


def measure_timings(process: TrainingProcess, folder: RunFolder) -> Timings:
    """Measure the timings of the reference run until it exits."""
    watcher, timings, launched_at = RunWatcher(folder), Timings(), time.monotonic()
    previous = watcher.read_status()
    step_began_at = evaluation_began_at = save_began_at = launched_at
    while process.poll() is None:
        time.sleep(POLL_SECONDS)
        status, now = watcher.read_status(), time.monotonic()
        if status.step != previous.step:
            if not previous.step:
                timings.start_up = now - launched_at
            elif status.step == previous.step + 1:
                timings.steps.append(now - step_began_at)
            step_began_at = evaluation_began_at = now
        if status.evaluated_step != previous.evaluated_step:
            timings.evaluations.append(now - evaluation_began_at)
        if status.saving and not previous.saving:
            save_began_at = now
        if previous.saving and not status.saving:
            timings.saves.append(now - save_began_at)
        previous = status
    timings.total = time.monotonic() - launched_at
    return timings
