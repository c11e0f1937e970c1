"""The timer of a run: seconds of the phases of a step and of the work between steps, without a host sync."""

import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Literal

import torch

from gpt.machine.peak_flops import synchronize

Phase = Literal["data", "forward", "backward", "optimizer"]
PHASES: tuple[Phase, ...] = ("data", "forward", "backward", "optimizer")
Part = Phase | Literal["evaluation", "sampling", "saving"]
"""A phase of the training step, or work between two steps."""
PARTS: tuple[Part, ...] = (*PHASES, "evaluation", "sampling", "saving")


class StepTimer:
    """Adds up the seconds of each part.

    On a GPU the phases of a step but "data" are timed by events, which are read once the GPU has passed them, so the
    host never waits for it. Everything else is timed on the host.

    Args:
        device: that runs the step.
        clock: monotonic, in seconds.
    """

    def __init__(self, device: torch.device, clock: Callable[[], float] = time.perf_counter):
        self._device, self._clock = device, clock
        self._seconds: dict[Part, float] = dict.fromkeys(PARTS, 0.0)
        self._taken: dict[Phase, float] = dict.fromkeys(PHASES, 0.0)
        self._current: tuple[Part, float] | None = None
        self.entered: tuple[int, Part | None] = (0, None)
        """Number of parts entered so far, and the last of them; other threads may read it."""
        self._events: deque[tuple[Part, torch.cuda.Event, torch.cuda.Event]] = deque()
        self.synchronizes = False
        """Waits for the device at both ends of every phase; exact, but slows a GPU down. For `gpt bench`."""

    @contextmanager
    def phase(self, name: Part) -> Iterator[None]:
        """Time a part."""
        self.entered = self.entered[0] + 1, name
        if self._device.type == "cuda" and not self.synchronizes and name in PHASES[1:]:
            start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            start.record()
            yield
            end.record()
            self._events.append((name, start, end))
            self._read_events(wait=False)
        else:
            began = self._now()
            self._current = name, began
            try:
                yield
            finally:
                self._current = None
            self._seconds[name] += self._now() - began

    def take(self) -> dict[Phase, float]:
        """Return the seconds of each phase of the step since the last call."""
        totals = self.totals()
        seconds = {phase: totals[phase] - self._taken[phase] for phase in PHASES}
        self._taken = {phase: totals[phase] for phase in PHASES}
        return seconds

    def totals(self) -> dict[Part, float]:
        """Return the seconds of each part since the timer was built."""
        self._read_events(wait=True)
        return dict(self._seconds)

    @property
    def current(self) -> tuple[Part | None, float]:
        """Part that the host is in, and its seconds so far; other threads may read it."""
        current = self._current
        return (None, 0.0) if current is None else (current[0], self._clock() - current[1])

    def _now(self) -> float:
        if self.synchronizes:
            synchronize(self._device)
        return self._clock()

    def _read_events(self, *, wait: bool) -> None:
        """Read the events that the GPU has passed; with `wait`, all of them."""
        while self._events and (wait or self._events[0][2].query()):
            name, start, end = self._events.popleft()
            end.synchronize()
            self._seconds[name] += start.elapsed_time(end) / 1e3
