"""What watches a run."""

from collections.abc import Iterable
from typing import Protocol

from gpt.training.events import Command, Event


class Observer(Protocol):
    """Lives on every rank, may run collectives, and never sees the Trainer.

    Its constructor gives it what it needs. It writes only its own fields, and acts on the run by what it returns.
    Its errors end the run.
    """

    def on_event(self, event: Event) -> Iterable[Command | Event]:
        """React: commands for the trainer, and events for the other observers to see."""
        ...

    def close(self, error: BaseException | None) -> None:
        """The run is over, by `error` if there is one; never a collective."""
        ...


class Sink(Protocol):
    """Lives on rank 0 and only records; one that raises is dropped, and the run goes on."""

    def write(self, event: Event) -> None:
        """Record an event, or ignore it."""
        ...

    def close(self, error: BaseException | None) -> None:
        """Release what is held."""
        ...
