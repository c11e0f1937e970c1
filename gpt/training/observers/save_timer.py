"""The observer that saves by the clock."""

import time
from collections.abc import Callable, Iterable

from gpt.training.events import CheckpointSaved, Command, Event, Save, StepEnd, TrainStart
from gpt.training.observer import Observer
from gpt.utils.distributed import DistContext


class SaveTimer(Observer):
    """Asks for a checkpoint when the last one is some minutes old.

    Rank 0's clock decides; its flag is reduced without waiting and read one step later, so that no step is held up.

    Args:
        minutes: between checkpoints; 0 never saves.
        dist: the processes that train.
        clock: seconds; monotonic.
    """

    def __init__(self, minutes: float, dist: DistContext, clock: Callable[[], float] = time.monotonic):
        self._seconds, self._dist, self._clock = 60 * minutes, dist, clock
        self._last = clock()
        self._pending = dist.all_reduce_max_async(0) if minutes else None

    def on_event(self, event: Event) -> Iterable[Command | Event]:
        """Save after the step at which it is due."""
        if isinstance(event, (TrainStart, CheckpointSaved)):
            self._last = self._clock()
        if self._pending is None or not isinstance(event, StepEnd):
            return ()
        due = self._pending.read()
        if due:
            self._last = self._clock()
        self._pending = self._dist.all_reduce_max_async(
            int(self._dist.is_main and self._clock() - self._last >= self._seconds)
        )
        return [Save()] if due else ()
