"""The observer that names a process for which the others wait, and what tells it how long each works by itself."""

import logging
import statistics
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager

import torch

from gpt.training.events import Command, Event, MetricsReady
from gpt.utils.distributed import DistContext

log = logging.getLogger(__name__)

SLOW = 2.0
"""Times the median of all processes."""
IN_A_ROW = 3
"""Reports after which a process that was slow in each is named."""


class OwnTime:
    """Seconds that this process has waited for data and computed forward passes, in which it waits for no other one.

    All processes end a step together, so the time of a step does not tell who is slow. On a GPU forward passes are
    measured there, and nobody waits for them until the sum is asked for.

    Args:
        device: that computes.
        clock: seconds; monotonic.
    """

    def __init__(self, device: torch.device, clock: Callable[[], float] = time.perf_counter):
        self._on_gpu, self._clock = device.type == "cuda", clock
        self._seconds = 0.0
        self._events: list[tuple[torch.cuda.Event, torch.cuda.Event]] = []

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """Around what the host waits for."""
        start = self._clock()
        yield
        self._seconds += self._clock() - start

    def around(
        self, context: Callable[[], AbstractContextManager[object]]
    ) -> Callable[[], AbstractContextManager[None]]:
        """The autocast context of a forward pass, timed."""

        @contextmanager
        def timed() -> Iterator[None]:
            if self._on_gpu:
                with context(), self._measured_there():
                    yield
            else:
                with context(), self.waiting():
                    yield

        return timed

    @contextmanager
    def _measured_there(self) -> Iterator[None]:
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        yield
        end.record()
        self._events.append((start, end))

    def take(self) -> float:
        """The seconds since this was asked the last time."""
        seconds, self._seconds = self._seconds, 0.0
        for start, end in self._events:
            end.synchronize()
            seconds += start.elapsed_time(end) / 1e3
        self._events.clear()
        return seconds


class StragglerGuard:
    """At each report compares the processes' own time; one that stays slow is named once, and the run goes on.

    Args:
        own_time: of this process.
        dist: the processes that are compared.
    """

    def __init__(self, own_time: OwnTime, dist: DistContext):
        self._own_time, self._dist = own_time, dist
        self._slow_for = [0] * dist.world_size

    def on_event(self, event: Event) -> Iterable[Command | Event]:
        """Compare after a report, whose steps have been waited for."""
        if isinstance(event, MetricsReady):
            seconds = self._dist.gather(self._own_time.take() / max(1, len(event.losses)))
            usual = statistics.median_low(seconds)
            for rank, own in enumerate(seconds):
                self._slow_for[rank] = self._slow_for[rank] + 1 if own > SLOW * usual else 0
                if self._slow_for[rank] == IN_A_ROW:
                    log.warning(
                        "step %d: rank %d is slow, and the others wait for it: %.1f ms of forward pass and waiting for "
                        "data in a step, %.1f times the median",
                        *(event.step, rank, 1e3 * own, own / usual),
                    )
        return ()

    def close(self, error: BaseException | None) -> None:
        """Nothing is held."""
