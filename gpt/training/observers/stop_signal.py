"""The observer that turns Ctrl-C and SIGTERM into an orderly end."""

import signal
import threading
from collections.abc import Iterable
from signal import SIGINT, SIGTERM
from types import FrameType
from typing import Any

from gpt.training.events import Command, Event, StepEnd, Stop, TrainStart
from gpt.training.observer import Observer
from gpt.utils.distributed import DistContext


class StopSignal(Observer):
    """A signal sets a flag; at the end of a step the ranks agree on it, and all stop after the same step.

    With several ranks the flag is reduced without waiting and read one step later, so that no step is held up. A
    second Ctrl-C ends the process at once: what is committed is whole.
    """

    def __init__(self, dist: DistContext):
        self._dist = dist
        self._received = 0
        self._pending = dist.all_reduce_max_async(0)
        self._previous: dict[int, Any] = {}

    def on_event(self, event: Event) -> Iterable[Command | Event]:
        """Listen while the run trains; stop once any rank has received a signal."""
        if isinstance(event, TrainStart) and threading.current_thread() is threading.main_thread():
            # Python gives signals to the main thread alone; a run in another thread belongs to its application.
            self._previous = {number: signal.signal(number, self._receive) for number in (SIGINT, SIGTERM)}
        if not isinstance(event, StepEnd):
            return ()
        agreed = self._received if self._dist.world_size == 1 else self._pending.read()
        self._pending = self._dist.all_reduce_max_async(self._received)
        return [Stop(signal.Signals(agreed).name)] if agreed else ()

    def close(self, error: BaseException | None) -> None:
        """Give the signals back."""
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _receive(self, number: int, frame: FrameType | None) -> None:
        if self._received and number == SIGINT:
            raise KeyboardInterrupt
        self._received = number
