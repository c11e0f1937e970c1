"""The observer that saves a checkpoint every few minutes."""

import time
from collections.abc import Callable, Iterable

from gpt.training.events import CheckpointSaved, Command, Event, Save, StepEnd, TrainStart
from gpt.training.observer import Observer
from gpt.utils.distributed import DistContext


class SaveTimer(Observer):
    """Saves a checkpoint when the last one is some minutes old.

    Rank 0's clock decides. Its flag is reduced asynchronously and read one step later, so that no step waits for it.

    Args:
        minutes: time between checkpoints; 0 never saves.
        dist: the ranks that train.
        clock: monotonic, in seconds.
    """

    def __init__(self, minutes: float, dist: DistContext, clock: Callable[[], float] = time.monotonic):
        self._seconds, self._dist, self._clock = 60 * minutes, dist, clock
        self._last = clock()
        self._pending = dist.all_reduce_max_async(0) if minutes else None

    def on_event(self, event: Event) -> Iterable[Command | Event]:
        """Save if the last checkpoint is old enough."""
        if isinstance(event, (TrainStart, CheckpointSaved)):
            self._last = self._clock()
        if self._pending is None or not isinstance(event, StepEnd):
            return ()
        is_due = self._pending.read()
        if is_due:
            self._last = self._clock()
        self._pending = self._dist.all_reduce_max_async(
            int(self._dist.is_main and self._clock() - self._last >= self._seconds)
        )
        return [Save()] if is_due else ()
