"""The live bar of a run: step, elapsed and remaining time, and what the run is doing, in one line of any width."""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from rich.cells import cell_len
from rich.text import Text

from gpt.training.sinks.console.lines import format_progress
from gpt.training.step_timer import StepTimer
from gpt.utils.helper import format_duration
from gpt.utils.progress import MAX_BAR_COLUMNS, MIN_BAR_COLUMNS, draw_bar
from gpt.utils.terminal import GAP

ACTIVITIES = {"evaluation": "evaluating", "sampling": "sampling", "saving": "saving"}
"""Part of a run that takes long enough to be shown -> its name in the bar."""
MIN_ACTIVITY_SECONDS = 0.3
"""Time after which a part is shown."""


@dataclass(frozen=True)
class BarState:
    """Values that the bar shows."""

    step: int
    max_steps: int
    elapsed: float
    """Seconds since the start of this launch."""
    remaining: float | None
    """Seconds to the last step; None before the first step of this launch."""
    numbers: Sequence[str] = ()
    """Numbers of the last report; the last ones are left out first where the terminal is narrow."""
    activity: str = ""
    """Description of the work between two steps."""


class Bar:
    """Values of a run's bar, which the sink changes and the thread of the live line reads.

    The pace counts evaluations and saves, and leaves out the first step, which also allocates and compiles.

    Args:
        max_steps: steps of the run.
        timer: names the part of the run that is under way; None: the bar shows no parts.
        unicode: draw with characters beyond ASCII.
        clock: monotonic, in seconds.
    """

    def __init__(
        self, max_steps: int, timer: StepTimer | None, *, unicode: bool, clock: Callable[[], float] = time.monotonic
    ):
        self._max_steps, self._timer, self._unicode, self._clock = max_steps, timer, unicode, clock
        self._step = self._n_steps = 0
        self._began = self._first_end = self._last_end = clock()
        self._numbers: Sequence[str] = ()

    def start(self, step: int) -> None:
        """Start the clock at the step that this launch starts from."""
        self._step = step
        self._began = self._clock()

    def end_step(self, step: int) -> None:
        """Show a step that has ended."""
        self._step, self._last_end = step, self._clock()
        if self._n_steps == 0:
            self._first_end = self._last_end
        self._n_steps += 1

    def rewind(self, step: int) -> None:
        """Show an earlier step, after a rollback."""
        self._step = step

    def report(self, numbers: Sequence[str]) -> None:
        """Show the numbers of a report."""
        self._numbers = numbers

    def render(self, columns: int) -> Text:
        """Return the bar as it is now."""
        return render_bar(self.state, columns, unicode=self._unicode)

    @property
    def elapsed(self) -> float:
        """Seconds since the start of this launch."""
        return self._clock() - self._began

    @property
    def state(self) -> BarState:
        """Values to show now."""
        return BarState(
            self._step, self._max_steps, self.elapsed, self._remaining, self._numbers, activity=self._activity
        )

    @property
    def _remaining(self) -> float | None:
        if self._n_steps == 0:
            return None
        seconds = self._last_end - self._first_end if self._n_steps > 1 else self._first_end - self._began
        pace = seconds / max(1, self._n_steps - 1)
        return max(0.0, pace * (self._max_steps - self._step) - (self._clock() - self._last_end))

    @property
    def _activity(self) -> str:
        part, seconds = self._timer.current if self._timer else (None, 0.0)
        name = ACTIVITIES.get(part or "", "")
        return f"{name} {seconds:.0f} s" if name and seconds >= MIN_ACTIVITY_SECONDS else ""


def render_bar(state: BarState, columns: int, *, unicode: bool) -> Text:
    """Return the fullest form of the bar that fits, empty if none does.

    The step, the times and the work between steps come first, then a bar, then the numbers in their order.
    """
    head = format_progress(state.step, state.max_steps)
    elapsed = f"{format_duration(state.elapsed)} elapsed"
    left = "" if state.remaining is None else f"{format_duration(state.remaining)} left"
    parts = [part for part in (state.activity, ", ".join(filter(None, (elapsed, left)))) if part]
    numbers = [] if state.activity else list(state.numbers)
    for count in range(len(numbers), -1, -1):
        texts = [*parts, *numbers[:count]]
        room = columns - cell_len(GAP.join([head, *texts])) - len(GAP)
        if room >= MIN_BAR_COLUMNS:
            bar = draw_bar(state.step / max(1, state.max_steps), min(room, MAX_BAR_COLUMNS), unicode=unicode)
            return Text(head + GAP) + bar + Text(GAP + GAP.join(texts))
    for texts in ([head, *parts], [head, state.activity, left or elapsed], [head, state.activity or left], [head]):
        text = GAP.join(filter(None, texts))
        if cell_len(text) <= columns:
            return Text(text)
    return Text()
