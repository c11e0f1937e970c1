"""The observer that writes a run down."""

import logging
from collections.abc import Iterable, Sequence

from gpt.training.events import Command, Event
from gpt.training.observer import Sink
from gpt.utils.helper import first_line

log = logging.getLogger(__name__)


class Logger:
    """Passes every event to its sinks; a sink that raises is named, dropped, and missed by nobody.

    Args:
        sinks: on rank 0 what records the run; none on the others.
    """

    def __init__(self, sinks: Sequence[Sink]):
        self._sinks = list(sinks)

    def on_event(self, event: Event) -> Iterable[Command | Event]:
        """Record; never react."""
        for sink in tuple(self._sinks):
            try:
                sink.write(event)
            except Exception as error:
                self._sinks.remove(sink)
                log.warning("%s stopped recording at step %d: %s", type(sink).__name__, event.step, first_line(error))
                _close(sink, error)
        return ()

    def close(self, error: BaseException | None) -> None:
        """Close the sinks."""
        for sink in self._sinks:
            _close(sink, error)


def _close(sink: Sink, error: BaseException | None) -> None:
    try:
        sink.close(error)
    except Exception as failure:
        log.warning("%s could not be closed: %s", type(sink).__name__, first_line(failure))
