"""The closing summary of a run: its loss curve, its best validation, its time by part, its files, the next commands."""

import math
import shlex
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gpt.checkpoint.manifest import VAL_LOSS
from gpt.checkpoint.run_folder import RunFolder
from gpt.configs.run_plan import RunPlan
from gpt.training.sinks.console.lines import format_evaluation, one_line
from gpt.training.sinks.console.loss_plot import VAL_MARK, plot_losses
from gpt.training.step_timer import Part
from gpt.utils.atomic_io import read_jsonl
from gpt.utils.helper import format_duration
from gpt.utils.terminal import RunConsole

TRAIN_LOSS = "train/loss"
MAX_PLOT_COLUMNS = 80
MIN_SHARE = 0.005
"""Share of the time below which a part is left out."""


@dataclass(frozen=True)
class Ending:
    """End of a run."""

    step: int
    reason: str
    seconds: float
    """Time since the start of this launch."""
    parts: Mapping[Part, float]
    """Seconds of each part; empty if nobody measured them."""


def print_summary(console: RunConsole, ending: Ending, plan: RunPlan, folder: RunFolder) -> None:
    """Print the summary of a run that has ended.

    Args:
        console: the run's console.
        ending: the last step, and how the time was spent.
        plan: the run's plan.
        folder: the run's, whose metrics.jsonl holds the losses of this launch and of those before it.
    """
    records = _read_records(folder.metrics)
    train = {record["step"]: loss for record in records if (loss := _number(record, TRAIN_LOSS)) is not None}
    evaluations = {record["step"]: record for record in records if _number(record, VAL_LOSS) is not None}
    val = {step: record[VAL_LOSS] for step, record in evaluations.items()}
    console.write_text(f"{one_line(ending.reason)} at step {ending.step} after {format_duration(ending.seconds)}")
    columns = min(console.columns or MAX_PLOT_COLUMNS, MAX_PLOT_COLUMNS)
    if plot := plot_losses(train, val, columns, unicode=console.has_unicode):
        console.write_text(f"train/loss, and {VAL_MARK} val/loss" if val else "train/loss")
        for line in plot:
            console.write_text(line)
    rows = {}
    if evaluations:
        rows["best validation"] = _format_best(min(evaluations.values(), key=lambda record: record[VAL_LOSS]), plan)
    if ending.parts:
        rows["time"] = _format_time(ending)
    to_copy = _list_files(folder) | _suggest_commands(ending, plan, folder)
    console.write_rows(rows | to_copy, unbroken=to_copy)


def _read_records(metrics: Path) -> list[dict[str, Any]]:
    """Return the records of metrics.jsonl; none if it cannot be read."""
    try:
        return [record for record in read_jsonl(metrics) if isinstance(record.get("step"), int)]
    except OSError:
        return []


def _number(record: Mapping[str, Any], name: str) -> float | None:
    value = record.get(name)
    return value if isinstance(value, int | float) and math.isfinite(value) else None


def _format_best(record: Mapping[str, Any], plan: RunPlan) -> str:
    metrics = {name: record[name] for name in (VAL_LOSS, "val/perplexity", "val/bpb") if _number(record, name)}
    text = f"{', '.join(format_evaluation(metrics))} at step {record['step']}"
    xz = plan.corpus.xz_bits_per_byte
    return text if xz is None or "val/bpb" not in metrics else f"{text} (xz -9e on the same files: {xz:.4f})"


def _format_time(ending: Ending) -> str:
    """Return the seconds of each part and their share."""
    parts: dict[str, float] = {name: seconds for name, seconds in ending.parts.items()}  # noqa: C416
    parts["other"] = max(0.0, ending.seconds - math.fsum(parts.values()))
    total = math.fsum(parts.values()) or 1.0
    return ", ".join(
        f"{name} {_format_seconds(seconds)} ({seconds / total:.0%})"
        for name, seconds in parts.items()
        if seconds >= MIN_SHARE * total
    )


def _format_seconds(seconds: float) -> str:
    if seconds < 1:
        return f"{1e3 * seconds:.0f} ms"
    return f"{seconds:.1f} s" if seconds < 60 else format_duration(seconds)


def _list_files(folder: RunFolder) -> dict[str, str]:
    """Return the rows of the files that the run has written."""
    rows = {"run folder": folder.path}
    if checkpoints := folder.list_checkpoints():
        rows["checkpoint"] = checkpoints[-1]
    rows |= {"metrics": folder.metrics, "samples": folder.samples, "trace": folder.trace}
    return {name: one_line(str(path)) for name, path in rows.items() if path.exists()}


def _suggest_commands(ending: Ending, plan: RunPlan, folder: RunFolder) -> dict[str, str]:
    run_dir = one_line(shlex.quote(str(folder.path)))
    sample = f"gpt sample {run_dir} --prompt TEXT"
    if ending.step < plan.max_steps:
        commands: Iterable[str] = ("the same command resumes the run", sample)
    else:
        commands = (sample, f"gpt verify {run_dir}")
    return dict(zip(("next", ""), commands, strict=True))
