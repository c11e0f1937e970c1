"""Where the time of a step goes, found by wrapping what the step is given; the step itself knows nothing of it."""

import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager

import torch

from gpt.machine.peak_flops import synchronize

PHASES = ("data", "forward", "backward", "optimizer")


class Stopwatch:
    """Seconds of each phase of a step; while it runs, every lap waits for the device, which makes a GPU slower.

    Args:
        device: that the step runs on.
        clock: seconds; monotonic.
    """

    def __init__(self, device: torch.device, clock: Callable[[], float] = time.perf_counter):
        self._device, self._clock = device, clock
        self._running = False
        self._last = 0.0
        self._seconds = dict.fromkeys(PHASES, 0.0)

    def start(self) -> None:
        """Begin a step."""
        synchronize(self._device)
        self._running, self._last = True, self._clock()
        self._seconds = dict.fromkeys(PHASES, 0.0)

    def lap(self, phase: str) -> None:
        """What happened since the last lap was `phase`; nothing, unless it runs."""
        if not self._running:
            return
        synchronize(self._device)
        now = self._clock()
        self._seconds[phase] += now - self._last
        self._last = now

    def stop(self) -> dict[str, float]:
        """End a step; returns the seconds of its phases."""
        self._running = False
        return self._seconds

    def around(
        self, context: Callable[[], AbstractContextManager[object]]
    ) -> Callable[[], AbstractContextManager[None]]:
        """The autocast context of a forward pass, timed: before it lies the backward pass of the micro-batch before."""

        @contextmanager
        def timed() -> Iterator[None]:
            self.lap("backward")  # before the first micro-batch, microseconds
            with context():
                yield
            self.lap("forward")

        return timed


class TimedScaler(torch.amp.GradScaler):
    """A scaler that tells where the last backward pass ends: it is asked to unscale what the update begins with.

    Args:
        device: cpu, cuda or mps.
        enabled: whether it scales.
        stopwatch: is told.
    """

    def __init__(self, device: str, *, enabled: bool, stopwatch: Stopwatch):
        super().__init__(device, enabled=enabled)
        self._stopwatch = stopwatch

    def unscale_(self, optimizer: torch.optim.Optimizer) -> None:
        """End the last backward pass."""
        self._stopwatch.lap("backward")
        super().unscale_(optimizer)
