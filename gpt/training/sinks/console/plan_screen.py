"""The plan of a run for people: what is trained on what, with how much memory, for how long."""

from collections.abc import Iterable
from dataclasses import dataclass

from gpt.configs.run_plan import RunPlan
from gpt.machine.data_sheet import find_data_sheet_peak
from gpt.machine.memory_estimate import MemoryEstimate
from gpt.training.sinks.console.lines import one_line
from gpt.utils.helper import format_count, format_duration, format_si, plural
from gpt.utils.terminal import RunConsole

MAX_MEMORY_SHARE = 0.9
"""Share of the available memory beyond which a plan warns."""


@dataclass(frozen=True)
class Memory:
    """Memory of one process."""

    needed: MemoryEstimate
    available: int | None
    """Bytes that are free now; None if unknown."""

    @property
    def note(self) -> str:
        """Warning if the run may not fit; else empty."""
        if self.available is None or self.needed.total <= MAX_MEMORY_SHARE * self.available:
            return ""
        return (
            f"the run needs about {format_si(self.needed.total, 'B')} of memory and {format_si(self.available, 'B')} "
            "are free: lower --micro-batch-size or the model's sizes, or add --parallel.activation-checkpointing block"
        )


@dataclass(frozen=True)
class Probe:
    """Measurements of two training steps."""

    seconds_per_step: float
    """Time of the second step; the first also allocates and compiles."""
    tokens_per_second: float
    steps: int
    """Steps left to train."""
    peak_memory_bytes: int | None

    @property
    def seconds(self) -> float:
        """Time to train the steps that are left, without evaluation and saving."""
        return self.seconds_per_step * self.steps


def print_plan(console: RunConsole, plan: RunPlan, memory: Memory | None = None, probe: Probe | None = None) -> None:
    """Print a plan as rows of a name and a value."""
    rows = format_plan(plan, memory, probe)
    console.write_rows({name: one_line(value) for name, value in rows.items()})
    for note in list_notes(plan, memory):
        console.write_rows({"note".ljust(max(map(len, rows))): one_line(note)})


def list_notes(plan: RunPlan, memory: Memory | None) -> Iterable[str]:
    """Return the remarks for the user."""
    return [*plan.notes, *([memory.note] if memory is not None and memory.note else [])]


def format_plan(plan: RunPlan, memory: Memory | None = None, probe: Probe | None = None) -> dict[str, str]:
    """Return name -> value of a plan's rows."""
    machine, batch, corpus = plan.machine, plan.batch, plan.corpus
    processes = plural(machine.world_size, "process", "es")
    rows = {
        "machine": f"{machine.device_name} ({machine.device}), {processes}, {plan.dtype}"
        + (", residuals too" if plan.rounds_residuals else "")
        + (", compiled" if plan.compiles else ""),
        "runtime": _format_runtime(plan),
        "model": f"{format_count(plan.model.n_parameters)} parameters: {plural(plan.model.n_layer, 'layer')}, "
        f"{plural(plan.model.n_head, 'head')}, {plan.model.n_embd} wide",
        "data": f"{format_count(corpus.train_tokens)} training tokens, vocabulary {corpus.vocab_size:,}",
        "validation": f"{format_count(corpus.val_tokens)} tokens, {format_si(corpus.val_bytes, 'B')} of text, "
        f"{plural(corpus.val_documents, 'document')}",
        "step": f"{batch.tokens_per_step:,} tokens: {batch.grad_accum_steps} x "
        f"{plural(batch.micro_batch_size, 'sequence')} of {batch.block_size} per process",
        "run": f"{plural(plan.max_steps, 'step')}, {format_count(plan.max_steps * batch.tokens_per_step)} tokens, "
        f"{plan.epochs:.2f} epochs",
        **_format_sources(plan),
        "learning rate": f"{plan.lr.schedule}, up to {_format_max_lrs(plan)} after "
        f"{plural(plan.lr.warmup_steps, 'step')}",
    }
    if data_sheet := find_data_sheet_peak(machine.device_name, plan.dtype):
        rows["data sheet"] = f"{format_si(data_sheet, 'FLOP/s')} per GPU; MFU is of the measured peak, and of this one"
    if memory is not None:
        rows["memory"] = _format_memory(memory)
    if probe is not None:
        rows["time"] = _format_probe(probe)
    return rows


def _format_memory(memory: Memory) -> str:
    need = memory.needed
    parts = {
        "weights": need.weights,
        "gradients": need.gradients,
        "optimizer": need.optimizer,
        "activations": need.activations,
        "checkpoint copy": need.checkpoint,
    }
    free = "" if memory.available is None else f", of {format_si(memory.available, 'B')} free"
    listed = ", ".join(f"{name} {format_si(size, 'B')}" for name, size in parts.items() if size)
    return f"about {format_si(need.total, 'B')} per process besides the program{free}: {listed}"


def _format_probe(probe: Probe) -> str:
    peak = probe.peak_memory_bytes
    memory = "" if peak is None else f", {format_si(peak, 'B')} of memory at the peak"
    return (
        f"about {format_duration(probe.seconds)} for {plural(probe.steps, 'step')}, without evaluation and saving: "
        f"{probe.seconds_per_step:.3g} s per step, {format_count(probe.tokens_per_second)} tokens/s{memory}"
    )


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
