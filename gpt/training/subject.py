"""The observed side of the Observer pattern."""

import logging
from collections import deque

from gpt.training.events import Command, Event
from gpt.training.logger import Logger
from gpt.training.observer import Observer, Probe, Sink, Watcher
from gpt.utils.helper import first_line

log = logging.getLogger(__name__)


class Subject:
    """Delivers events to its observers in the order in which they were attached, and last to its sinks.

    Args:
        logger: writes events to the sinks.
    """

    def __init__(self, logger: Logger) -> None:
        self._logger = logger
        self._observers: list[Observer] = []
        self._probes: list[Probe] = []

    def attach(self, watcher: Watcher) -> None:
        """Add an Observer, a Sink or a Probe.

        Raises:
            TypeError: it is none of them.
        """
        match watcher:
            case Observer():
                self._observers.append(watcher)
            case Sink():
                self._logger.attach(watcher)
            case Probe():
                self._probes.append(watcher)
            case _:
                raise TypeError(
                    f"{type(watcher).__name__} cannot be attached: derive it from Sink, Observer or Probe "
                    "(gpt/training/observer.py)"
                )

    def detach(self, watcher: Watcher) -> None:
        """Remove a watcher without closing it.

        Raises:
            ValueError: it is not attached.
        """
        match watcher:
            case Observer():
                self._observers.remove(watcher)
            case Sink():
                self._logger.detach(watcher)
            case Probe():
                self._probes.remove(watcher)
            case _:
                raise ValueError(f"{type(watcher).__name__} is not attached")

    def notify(self, event: Event) -> list[Command]:
        """Deliver an event to all observers and sinks, then the events that observers published, first in, first out.

        Returns:
            The commands that observers gave, in order.
        """
        commands: list[Command] = []
        events = deque([event])
        while events:
            current = events.popleft()
            for observer in tuple(self._observers):
                for reaction in observer.on_event(current):
                    if isinstance(reaction, Event):
                        events.append(reaction)
                    else:
                        commands.append(reaction)
            self._logger.write(current)
        return commands

    def close(self, error: BaseException | None) -> None:
        """Close every observer and sink, also when one of them fails.

        The first failure is raised at the end, unless an error ended the run: that is the one to raise. All others are
        logged.
        """
        first_failure: Exception | None = None
        for observer in self._observers:
            try:
                observer.close(error)
            except Exception as failure:
                if error is None and first_failure is None:
                    first_failure = failure
                else:
                    log.error("%s could not be closed: %s", type(observer).__name__, first_line(failure))
        self._logger.close(error)
        if first_failure is not None:
            raise first_failure
