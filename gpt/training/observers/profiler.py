"""The observer that shows where the time of a step goes."""

import logging
from collections.abc import Iterable
from pathlib import Path

from torch.profiler import profile

from gpt.configs.observer_config import ProfileConfig
from gpt.training.events import Command, Event, StepEnd, TrainStart
from gpt.training.observer import Observer

log = logging.getLogger(__name__)


class Profiler(Observer):
    """Traces the steps that were asked for, on CPU and GPU, and writes them as a Chrome trace.

    A run that ends, or is stopped, within them leaves the trace of those that it took.

    Args:
        config: which steps.
        trace: file to write; None traces nothing, as on every process but the first.
    """

    def __init__(self, config: ProfileConfig, trace: Path | None):
        self._trace = trace
        self._before, self._last = config.start - 1, config.start - 1 + config.steps
        self._recording: profile | None = None

    def on_event(self, event: Event) -> Iterable[Command | Event]:
        """Begin before the first of the steps, end after the last."""
        if self._trace is None or not isinstance(event, (TrainStart, StepEnd)):
            return ()
        if isinstance(event, TrainStart) and event.step >= self._last > self._before:
            log.warning("no step is traced: --profile.start is %d, the run is at %d", self._before + 1, event.step)
        if event.step >= self._last:
            self._end()
        elif event.step >= self._before and self._recording is None:
            self._recording = profile()
            self._recording.start()
        return ()

    def close(self, error: BaseException | None) -> None:
        """Write what there is."""
        self._end()

    def _end(self) -> None:
        if self._recording is not None:
            self._recording.stop()
            self._recording.export_chrome_trace(str(self._trace))
            self._recording = None
