"""The observer that names a slow rank, for which the others wait."""

import logging
import statistics
from collections.abc import Iterable

from gpt.training.events import Command, Event, MetricsReady
from gpt.training.observer import Observer
from gpt.training.step_timer import StepTimer
from gpt.utils.distributed import DistContext

log = logging.getLogger(__name__)

SLOW_RATIO = 2.0
"""A rank is slow whose time is more than this times the median of all ranks."""
REPORTS_IN_A_ROW = 3
"""A rank is named once it was slow in so many reports in a row."""


class StragglerGuard(Observer):
    """Compares the ranks' time for data and forward passes at each report; warns once about a rank that stays slow.

    All ranks end a step together, because backward passes wait for each other. So the time of a step does not show
    which rank is slow.

    Args:
        timer: of this rank's training step.
        dist: the ranks that are compared.
    """

    def __init__(self, timer: StepTimer, dist: DistContext):
        self._timer, self._dist = timer, dist
        self._slow_reports = [0] * dist.world_size

    def on_event(self, event: Event) -> Iterable[Command | Event]:
        """Compare after a report, for which the host has waited for the device."""
        if isinstance(event, MetricsReady):
            phases = self._timer.take()
            seconds = self._dist.gather((phases["data"] + phases["forward"]) / max(1, len(event.losses)))
            median = statistics.median_low(seconds)
            for rank, own in enumerate(seconds):
                self._slow_reports[rank] = self._slow_reports[rank] + 1 if own > SLOW_RATIO * median else 0
                if self._slow_reports[rank] == REPORTS_IN_A_ROW:
                    log.warning(
                        "step %d: rank %d is slow, and the others wait for it: %.1f ms of forward pass and waiting for "
                        "data in a step, %.1f times the median",
                        *(event.step, rank, 1e3 * own, own / median),
                    )
        return ()
