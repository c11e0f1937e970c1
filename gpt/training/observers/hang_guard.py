"""The observer that lets heartbeats follow the training thread, so that a rank that hangs is named."""

from collections.abc import Iterable

from gpt.training.events import Command, Event, StepEnd, TrainStart
from gpt.training.observer import Observer
from gpt.training.step_timer import PHASES, StepTimer
from gpt.utils.distributed import DistContext
from gpt.utils.hang import Progress


class HangGuard(Observer):
    """Counts this rank's progress in steps and in parts of the step timer.

    A rank is inside a step from the first phase on until this observer gets StepEnd. So it is attached after the
    observers that wait for other ranks in every step, and before those whose work may take long.

    Args:
        timer: of this rank's training step.
        dist: the ranks; their heartbeats end the run if one hangs.
    """

    def __init__(self, timer: StepTimer, dist: DistContext):
        self._timer, self._heartbeat = timer, dist.heartbeat
        self._step_end = (0, 0)
        """The last step that has ended, and the parts entered until then."""

    def on_event(self, event: Event) -> Iterable[Command | Event]:
        """Follow the run from TrainStart on; a step is over at StepEnd."""
        if isinstance(event, TrainStart | StepEnd):
            self._step_end = event.step, self._timer.entered[0]
        if isinstance(event, TrainStart) and self._heartbeat is not None:
            self._heartbeat.start_training(self._read_progress)
        return ()

    def close(self, error: BaseException | None) -> None:
        """Follow the run no more: what the process does now is its own affair."""
        if self._heartbeat is not None:
            self._heartbeat.end_training()

    def _read_progress(self) -> Progress:
        (step, parts_before), (n_parts, part) = self._step_end, self._timer.entered
        parts = n_parts - parts_before
        return Progress(step, parts, in_step=parts > 0 and part in PHASES)
