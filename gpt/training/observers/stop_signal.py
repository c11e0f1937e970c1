"""The observer that ends a run cleanly at Ctrl-C or SIGTERM."""

import contextlib
import os
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
    """Stops all ranks after the same step once any of them has received a signal.

    With several ranks the flag is reduced asynchronously and read one step later, so that no step waits for it. A
    second Ctrl-C ends the process at once; committed checkpoints stay valid.
    """

    def __init__(self, dist: DistContext):
        self._dist = dist
        self._received = 0
        self._pending = dist.all_reduce_max_async(0)
        self._previous: dict[int, Any] = {}

    def on_event(self, event: Event) -> Iterable[Command | Event]:
        """Handle signals from TrainStart on; stop once any rank has received one."""
        if isinstance(event, TrainStart) and threading.current_thread() is threading.main_thread():
            # Only the main thread can handle signals; in another thread they belong to the application.
            self._previous = {number: signal.signal(number, self._receive) for number in (SIGINT, SIGTERM)}
        if not isinstance(event, StepEnd):
            return ()
        received = self._received if self._dist.world_size == 1 else self._pending.read()
        self._pending = self._dist.all_reduce_max_async(self._received)
        return [Stop(signal.Signals(received).name)] if received else ()

    def close(self, error: BaseException | None) -> None:
        """Restore the previous handlers."""
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _receive(self, number: int, frame: FrameType | None) -> None:
        if self._received and number == SIGINT:
            raise KeyboardInterrupt
        if number == SIGINT and self._dist.is_main:
            with contextlib.suppress(OSError):  # not print: a handler may run within a print
                os.write(2, b"gpt: stopping after this step; a second Ctrl-C leaves at once\n")
        self._received = number
