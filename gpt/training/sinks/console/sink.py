"""The sink that shows a run on the console: a live bar and chosen lines on a terminal, every report elsewhere."""

import math
from collections.abc import Sequence

from gpt.checkpoint.run_folder import RunFolder
from gpt.configs.run_plan import RunPlan
from gpt.training.events import (
    CheckpointSaved,
    EvalEnd,
    Event,
    MetricsReady,
    RolledBack,
    SpikeSeen,
    StepEnd,
    TextSampled,
    TrainEnd,
    TrainStart,
)
from gpt.training.observer import Sink
from gpt.training.sinks.console.bar import Bar
from gpt.training.sinks.console.lines import (
    LogLines,
    format_event,
    format_report,
    format_sample,
    format_smoothed_report,
    format_speed,
)
from gpt.training.sinks.console.summary import Ending, print_summary
from gpt.training.step_timer import StepTimer
from gpt.utils.live_line import LiveLine
from gpt.utils.terminal import GAP, RunConsole, wrap_parts

INDENT = 4
"""Columns before the second and later lines of a line that is too long for the terminal."""


class ConsoleSink(Sink):
    """Shows reports, evaluations, samples, spikes and saves; at the end a summary.

    On a terminal a bar shows every step, and some of the reports are lines that stay. Elsewhere each report is a line.

    Args:
        console: the terminal, or the file that stdout goes to.
        plan: the run's plan.
        folder: the run's folder; the summary reads its metrics.
        timer: measures the run; None: the summary shows no time by part, and the bar no work between steps.
    """

    events: tuple[type[Event], ...] = (
        TrainStart,
        StepEnd,
        MetricsReady,
        SpikeSeen,
        RolledBack,
        EvalEnd,
        TextSampled,
        CheckpointSaved,
        TrainEnd,
    )

    def __init__(self, console: RunConsole, plan: RunPlan, folder: RunFolder, timer: StepTimer | None = None):
        self._console, self._plan, self._folder, self._timer = console, plan, folder, timer
        self._bar = Bar(plan.max_steps, timer, unicode=console.has_unicode)
        self._line = LiveLine(console, self._bar.render)
        self._log_lines = LogLines(plan.max_steps)
        self._losses: list[float] = []
        if not console.is_interactive:  # no bar, which alone shows every step
            self.events = tuple(event for event in self.events if event is not StepEnd)

    def write(self, event: Event) -> None:
        """Show an event."""
        match event:
            case TrainStart(step=step):
                self._bar.start(step)
                self._line.start()
            case StepEnd(step=step):
                self._bar.end_step(step)
            case MetricsReady():
                self._report(event)
            case TextSampled():
                with self._line.pause():
                    self._console.write_text(format_sample(event))
            case RolledBack(to_step=to_step):
                self._bar.rewind(to_step)
                self._log_lines.rewind(to_step)
            case TrainEnd(step=step, reason=reason):
                self._line.stop()
                seconds = self._timer.totals() if self._timer else {}
                print_summary(self._console, Ending(step, reason, self._bar.elapsed, seconds), self._plan, self._folder)
        if parts := format_event(event):
            self._print(parts, separator=" ")

    def close(self, error: BaseException | None) -> None:
        """Erase the live bar."""
        self._line.stop()

    def _report(self, event: MetricsReady) -> None:
        if not self._console.is_interactive:
            self._print(format_report(event, self._plan))
            return
        self._losses += event.losses
        loss = f"loss {event.metrics['train/loss']:.4f}"
        self._bar.report([loss, *format_speed(event.metrics)])
        if self._log_lines.takes(event.step):
            mean_loss = math.fsum(self._losses) / len(self._losses)
            self._print(format_smoothed_report(event, self._plan, mean_loss))
            self._losses.clear()

    def _print(self, parts: Sequence[str], separator: str = GAP) -> None:
        with self._line.pause():
            self._console.write_text(wrap_parts(parts, self._console.columns, separator=separator, indent=INDENT))
