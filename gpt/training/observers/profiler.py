"""The observer that traces steps with torch.profiler."""

import logging
from collections.abc import Iterable
from pathlib import Path

from torch.profiler import profile

from gpt.configs.observer_config import ProfileConfig
from gpt.training.events import Command, Event, StepEnd, TrainStart
from gpt.training.observer import Observer

log = logging.getLogger(__name__)


class Profiler(Observer):
    """Traces the configured steps on CPU and GPU, and writes a Chrome trace.

    A run that ends within these steps leaves the trace of those that it took.

    Args:
        config: names the steps.
        trace: file to write; None, on every rank but 0, traces nothing.
    """

    def __init__(self, config: ProfileConfig, trace: Path | None):
        self._trace = trace
        self._first, self._last = config.start, config.start - 1 + config.steps
        self._recording: profile | None = None

    def on_event(self, event: Event) -> Iterable[Command | Event]:
        """Start before the first of the steps, stop after the last."""
        if self._trace is None or not isinstance(event, (TrainStart, StepEnd)):
            return ()
        if isinstance(event, TrainStart) and event.step >= self._last >= self._first:
            log.warning(
                "no step is traced: --profile.start is %d but the run resumes at step %d", self._first, event.step
            )
        if event.step >= self._last:
            self._stop()
        elif event.step + 1 >= self._first and self._recording is None:
            self._recording = profile()
            self._recording.start()
        return ()

    def close(self, error: BaseException | None) -> None:
        """Write the trace of an unfinished profile."""
        self._stop()

    def _stop(self) -> None:
        if self._recording is not None:
            self._recording.stop()
            self._recording.export_chrome_trace(str(self._trace))
            self._recording = None
