"""The three kinds of watchers that a Trainer takes: Observer, Sink and Probe."""

from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING

from gpt.training.events import Command, Event

if TYPE_CHECKING:
    import torch


class Observer(ABC):
    """Lives on every rank, may run collectives, and acts on the run by the commands and events that it returns.

    Its constructor gives it what it needs; it never sees the Trainer and writes only its own fields. An error that it
    raises ends the run. To add one: docs/extending.md, "An observer".
    """

    @abstractmethod
    def on_event(self, event: Event) -> Iterable[Command | Event]:
        """Return commands for the Trainer, and events for all other watchers."""

    def close(self, error: BaseException | None) -> None:  # noqa: B027 - most observers have no resources
        """Release resources at the end of the run; never run a collective.

        Args:
            error: error that ended the run; None on a clean end.
        """


class Sink(ABC):
    """Records events, on rank 0; one that raises or blocks is dropped with a warning, and the run goes on.

    An essential one is never dropped: it keeps what it cannot write, and is asked again before each save.

    Its methods are called on a thread of its own, one at a time. On other ranks it is never called. To add one:
    docs/extending.md, "A sink".
    """

    events: tuple[type[Event], ...] = (Event,)
    """Types of the events that `write` takes; it is called for no other."""

    is_essential: bool = False
    """The run's record needs this sink: it is not dropped, and a run whose record is incomplete exits with status 1."""

    @abstractmethod
    def write(self, event: Event) -> None:
        """Record an event."""

    def flush(self) -> None:  # noqa: B027 - most sinks keep nothing back
        """Write what an earlier call could not."""

    def close(self, error: BaseException | None) -> None:  # noqa: B027 - most sinks have no resources
        """Release resources at the end of the run, or when the sink is dropped; raise if its record is incomplete.

        Args:
            error: error that ended the run or the sink; None on a clean end.
        """


class Probe(ABC):
    """Maps parameters and their gradients to device scalars, on every rank, on steps that report.

    The scalars join the metrics of the report and cost no host sync of their own. A probe runs without autograd, after
    the gradient is complete and unscaled, before it is clipped. An error that it raises ends the run. To add one:
    docs/extending.md, "A probe".
    """

    @abstractmethod
    def measure(self, parameters: "Mapping[str, torch.nn.Parameter]") -> "Mapping[str, torch.Tensor]":
        """Return metrics by their full names, as scalars that stay on the device.

        Args:
            parameters: name -> parameter; `grad` is the gradient of the step's mean loss, equal on every rank.
        """


Watcher = Observer | Sink | Probe
