"""Lines that a run prints about its events."""

from collections.abc import Mapping

from gpt.configs.run_plan import RunPlan
from gpt.training.events import (
    CheckpointSaved,
    EvalEnd,
    Event,
    MetricsReady,
    RolledBack,
    SpikeSeen,
    TextSampled,
    TrainStart,
)
from gpt.utils.helper import format_count, format_duration, format_percent, plural, printable

MAX_LOG_LINES = 20
"""Log lines of a run on a terminal, where a bar shows every step, spread evenly over it."""
SAMPLE_RULE = "-" * 40


class LogLines:
    """Choice of the reports of a terminal's log: the first, the last, and evenly spread ones between.

    Args:
        max_steps: steps of the run.
    """

    def __init__(self, max_steps: int):
        self._max_steps = max_steps
        self._last_part: int | None = None

    def takes(self, step: int) -> bool:
        """Return whether to log the report of a step; to be called once for each report."""
        part = step * MAX_LOG_LINES // self._max_steps
        is_taken = self._last_part is None or part > self._last_part or step >= self._max_steps
        if is_taken:
            self._last_part = part
        return is_taken

    def rewind(self, step: int) -> None:
        """Return to an earlier step, after a rollback."""
        self._last_part = step * MAX_LOG_LINES // self._max_steps


def format_report(event: MetricsReady, plan: RunPlan) -> list[str]:
    """Return the parts of the log line of a report."""
    metrics = event.metrics
    remaining = (plan.max_steps - event.step) * plan.batch.tokens_per_step
    speed = metrics["tokens_per_second"]
    eta = format_duration(remaining / speed) if speed else "unknown"
    return [
        format_progress(event.step, plan.max_steps),
        f"loss {metrics['train/loss']:.4f}",
        f"lr {metrics['lr']:.2e}",
        *format_speed(metrics),
        f"ETA {eta}",
    ]


def format_smoothed_report(event: MetricsReady, plan: RunPlan, mean_loss: float) -> list[str]:
    """Return the parts of a log line for several reports.

    Args:
        event: the last report.
        plan: the run's plan.
        mean_loss: mean of train/loss over their steps.
    """
    return [
        format_progress(event.step, plan.max_steps),
        f"mean loss {mean_loss:.4f}",
        f"lr {event.metrics['lr']:.2e}",
        *format_speed(event.metrics),
    ]


def format_progress(step: int, max_steps: int) -> str:
    """Return the step out of all steps."""
    return f"step {step}/{max_steps}"


def format_speed(metrics: Mapping[str, float]) -> list[str]:
    """Return tokens per second and MFU, of the measured peak and of the data sheet's if that is known."""
    mfu = [f"MFU {format_percent(metrics['mfu'])}"] if metrics["mfu"] else []
    if mfu and "mfu_data_sheet" in metrics:
        mfu = [f"{mfu[0]} ({format_percent(metrics['mfu_data_sheet'])} of data sheet)"]
    return [f"{format_count(metrics['tokens_per_second'])} tokens/s", *mfu]


def format_evaluation(metrics: Mapping[str, float]) -> list[str]:
    """Return `name value` for each metric."""
    return [f"{name} {_format_metric(name, value)}" for name, value in metrics.items()]


def format_event(event: Event) -> list[str]:
    """Return the line of an event that is printed on every console, as parts; none for other events."""
    match event:
        case SpikeSeen(step=step, loss=loss, median=median, deviations=deviations):
            distance = f"{deviations:.1f} deviations above the median {median:.4f}"
            return f"step {step}: loss {loss:.4f} is a spike, {distance}".split(" ")
        case RolledBack(step=step, to_step=to_step, reason=reason):
            return one_line(f"step {step}: rolled back to step {to_step}: {reason}").split(" ")
        case EvalEnd(step=step, metrics=metrics):
            *values, last = map(one_line, format_evaluation(metrics))
            return [f"step {step}:", *(f"{value}," for value in values), last]
        case CheckpointSaved(step=step, path=path):
            return [f"step {step}: saved", one_line(path)]
        case MetricsReady(skipped=skipped) if skipped:
            updates, steps = plural(len(skipped), "update"), ", ".join(map(str, skipped))
            return f"step {steps}: {updates} skipped: a NaN or inf in the loss or gradient".split(" ")
        case TrainStart(resumed_from=checkpoint) if checkpoint:
            return ["resuming from", one_line(checkpoint)]
    return []


def format_sample(event: TextSampled) -> str:
    """Return a sample between two rules, its text as the model wrote it, but for control characters."""
    head = f"--- sample of step {event.step} "
    return f"{head:-<{len(SAMPLE_RULE)}}\n{printable(event.prompt + event.text)}\n{SAMPLE_RULE}"


def one_line(text: str) -> str:
    """Escape control characters and line breaks, which a path or a name may have."""
    return printable(text).replace("\n", "\\n")


def _format_metric(name: str, value: float) -> str:
    if name.endswith("perplexity"):
        return f"{value:,.2f}" if value < 1e6 else f"{value:.2e}"
    return f"{value:.4f}"
