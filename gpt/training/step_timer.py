"""The timer of a training step: seconds of its phases, without a host sync."""

import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Literal

import torch

from gpt.machine.peak_flops import synchronize

Phase = Literal["data", "forward", "backward", "optimizer"]
PHASES: tuple[Phase, ...] = ("data", "forward", "backward", "optimizer")


class StepTimer:
    """Adds up the seconds of each phase.

    "data" is timed on the host. On a GPU the other phases are timed by events, which are read once the GPU has passed
    them, so the host never waits for it. On other devices all phases are timed on the host.

    Args:
        device: that runs the step.
        clock: monotonic, in seconds.
    """

    def __init__(self, device: torch.device, clock: Callable[[], float] = time.perf_counter):
        self._device, self._clock = device, clock
        self._seconds = dict.fromkeys(PHASES, 0.0)
        self._events: deque[tuple[Phase, torch.cuda.Event, torch.cuda.Event]] = deque()
        self.synchronizes = False
        """Waits for the device at both ends of every phase; exact, but slows a GPU down. For `gpt bench`."""

    @contextmanager
    def phase(self, name: Phase) -> Iterator[None]:
        """Time a part of the step."""
        if self._device.type == "cuda" and not self.synchronizes and name != "data":
            start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            start.record()
            yield
            end.record()
            self._events.append((name, start, end))
            self._read_events(wait=False)
        else:
            began = self._now()
            yield
            self._seconds[name] += self._now() - began

    def take(self) -> dict[Phase, float]:
        """Return the seconds of each phase since the last call."""
        self._read_events(wait=True)
        seconds, self._seconds = self._seconds, dict.fromkeys(PHASES, 0.0)
        return seconds

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
