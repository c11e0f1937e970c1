"""The observed side of the Observer pattern."""

from collections import deque

from gpt.training.events import Command, Event
from gpt.training.observer import Observer


class Subject:
    """Delivers events to its observers, in the order in which they were attached."""

    def __init__(self) -> None:
        self._observers: list[Observer] = []

    def attach(self, observer: Observer) -> None:
        """Add an observer; it is told last."""
        self._observers.append(observer)

    def detach(self, observer: Observer) -> None:
        """Remove an observer; raises ValueError if it is not attached."""
        self._observers.remove(observer)

    def notify(self, event: Event) -> list[Command]:
        """Tell every observer, then tell all of them the events that they published, first in, first out.

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
        return commands

    def close(self, error: BaseException | None) -> None:
        """Close every observer, also when one of them fails at it; the first failure is raised at the end."""
        failures: list[Exception] = []
        for observer in self._observers:
            try:
                observer.close(error)
            except Exception as failure:
                failures.append(failure)
        if failures:
            raise failures[0]
