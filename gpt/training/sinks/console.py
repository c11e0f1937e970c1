"""The sink that shows a run on the console: a live bar on a terminal, plain lines elsewhere."""

from collections.abc import Mapping
from pathlib import Path

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

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
from gpt.utils.helper import format_si, plural, printable


class RunConsole(Console):
    """A console that raises BrokenPipeError when stdout is closed, where rich would end the process."""

    def on_broken_pipe(self) -> None:
        """Raise the error to the caller."""
        raise


class ConsoleSink(Sink):
    """Shows step, loss, learning rate, tokens per second and ETA; evaluations, samples and checkpoints above the bar.

    Args:
        console: of the terminal, or of the file that stdout goes to.
        plan: shown at the start.
        run_dir: named in the last line.
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

    def __init__(self, console: Console, plan: RunPlan, run_dir: Path):
        self._console, self._plan, self._run_dir = console, plan, run_dir
        self._progress = Progress(
            TextColumn("step"),
            MofNCompleteColumn(),
            BarColumn(bar_width=24),
            TextColumn("{task.fields[numbers]}"),
            TextColumn("ETA"),
            TimeRemainingColumn(),
            console=console,
            disable=not console.is_terminal,
        )
        self._task = self._progress.add_task("train", numbers="", start=False)
        if not console.is_terminal:  # no bar, which alone shows every step
            self.events = tuple(event for event in self.events if event is not StepEnd)

    def write(self, event: Event) -> None:
        """Show an event."""
        match event:
            case TrainStart():
                self._start(event)
            case StepEnd(step=step):
                self._progress.update(self._task, completed=step)
            case MetricsReady(step=step, metrics=metrics, skipped=skipped):
                self._show_metrics(step, metrics)
                if skipped:
                    updates = plural(len(skipped), "update")
                    steps = ", ".join(map(str, skipped))
                    self._print_line(f"step {steps}: {updates} skipped: a NaN or inf in the loss or gradient")
            case SpikeSeen(step=step, loss=loss, median=median, deviations=deviations):
                distance = f"{deviations:.1f} deviations above the median {median:.4f}"
                self._print_line(f"step {step}: loss {loss:.4f} is a spike, {distance}")
            case RolledBack(step=step, to_step=to_step, reason=reason):
                self._print_line(f"step {step}: rolled back to step {to_step}: {reason}")
            case EvalEnd(step=step, metrics=metrics):
                self._print_line(f"step {step}: " + ", ".join(f"{name} {value:.4f}" for name, value in metrics.items()))
                self._compare_with_xz(metrics.get("val/bpb"))
            case TextSampled(prompt=prompt, text=text):
                self._print_line("--- sample " + "-" * 40)
                self._console.print(Text(printable(prompt + text)))
                self._print_line("-" * 51)
            case CheckpointSaved(step=step, path=path):
                self._print_line(f"step {step}: saved {path}")
            case TrainEnd(step=step, reason=reason):
                self._progress.stop()
                self._print_line(f"{reason} at step {step}; {self._suggest_command(step)}")

    def close(self, error: BaseException | None) -> None:
        """Stop the live bar."""
        self._progress.stop()

    def _start(self, event: TrainStart) -> None:
        self._console.print(build_plan_table(self._plan))
        if event.resumed_from:
            self._print_line(f"resuming from {event.resumed_from}")
        self._progress.update(self._task, total=self._plan.max_steps, completed=event.step)
        self._progress.start_task(self._task)
        self._progress.start()

    def _show_metrics(self, step: int, metrics: Mapping[str, float]) -> None:
        numbers = (
            f"loss {metrics['train/loss']:.4f}  lr {metrics['lr']:.2e}  "
            f"{format_si(metrics['tokens_per_second'])} tokens/s  MFU {metrics['mfu']:.1%}"
        )
        if self._console.is_terminal:
            self._progress.update(self._task, numbers=numbers)
        else:
            remaining = (self._plan.max_steps - step) * self._plan.batch.tokens_per_step
            self._print_line(
                f"step {step}/{self._plan.max_steps}  {numbers}  "
                f"ETA {_format_duration(remaining / metrics['tokens_per_second'])}"
            )

    def _compare_with_xz(self, bpb: float | None) -> None:
        xz = self._plan.corpus.xz_bits_per_byte
        if bpb is not None and xz is not None:
            self._print_line(f"        bits per byte: {bpb:.3f}; xz -9e on the same files: {xz:.3f}")

    def _suggest_command(self, step: int) -> str:
        if step < self._plan.max_steps:
            return "the same command resumes the run"
        return f"try gpt sample {self._run_dir} --prompt TEXT"

    def _print_line(self, line: str) -> None:
        self._console.print(escape(line), highlight=False, soft_wrap=True)


def build_plan_table(plan: RunPlan) -> Table:
    """Return the plan as a table for people."""
    machine, batch, corpus = plan.machine, plan.batch, plan.corpus
    processes = plural(machine.world_size, "process", "es")
    rows = {
        "machine": f"{machine.device_name} ({machine.device}), {processes}, {plan.dtype}",
        "runtime": _format_runtime(plan),
        "model": f"{format_si(plan.model.n_parameters)} parameters: {plan.model.n_layer} layers, "
        f"{plan.model.n_head} heads, {plan.model.n_embd} wide",
        "data": f"{format_si(corpus.train_tokens)} training tokens, vocabulary {corpus.vocab_size:,}",
        "validation": f"{format_si(corpus.val_tokens)} tokens, {format_si(corpus.val_bytes)}B of text, "
        f"{plural(corpus.val_documents, 'document')}",
        "step": f"{batch.tokens_per_step:,} tokens: {batch.grad_accum_steps} x {batch.micro_batch_size} sequences "
        f"of {batch.block_size} per process",
        "run": f"{plan.max_steps:,} steps, {format_si(plan.max_steps * batch.tokens_per_step)} tokens, "
        f"{plan.epochs:.2f} epochs",
        **_format_sources(plan),
        "learning rate": f"{plan.lr.schedule}, up to {_format_max_lrs(plan)} after {plan.lr.warmup_steps} steps",
    }
    table = Table.grid(padding=(0, 2))
    for name, value in rows.items():
        table.add_row(name, escape(value))
    for note in plan.notes:
        table.add_row("note", escape(note))
    return table


def _format_max_lrs(plan: RunPlan) -> str:
    adamw = f"{plan.lr.max_lr:g}"
    return f"{plan.optimizer.muon_lr:g} (muon) and {adamw} (adamw)" if plan.optimizer.name == "muon" else adamw


def _format_runtime(plan: RunPlan) -> str:
    """Return the process settings under the names of their flags, with no- if off."""
    runtime = plan.machine.runtime
    switches = [("" if on else "no-") + name.replace("_", "-") for name, on in runtime.items() if isinstance(on, bool)]
    return ", ".join([plural(runtime.get("threads", 1), "thread"), *switches])


def _format_sources(plan: RunPlan) -> dict[str, str]:
    """Return the row of a mixture's sources; none for a single source."""
    if len(plan.sources) < 2:
        return {}
    shares = [f"{source.name} {source.share:.1%}, {source.epochs:.2f} epochs" for source in plan.sources]
    return {"sources": "; ".join(shares)}


def _format_duration(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{seconds:02d}"
