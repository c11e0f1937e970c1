"""Facts that a dry run reports beyond the plan: the time of two steps, and everything as JSON."""

import time
from contextlib import closing
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from gpt.training.sinks.console.plan_screen import Memory, Probe

if TYPE_CHECKING:
    from gpt.run import Run


def probe_steps(run: "Run") -> Probe:
    """Train two steps on every rank, measure the second one, and keep nothing of them."""
    from gpt.data.corpus import build_sequences
    from gpt.data.data_loader import DataLoader
    from gpt.machine.hardware import peak_memory
    from gpt.machine.peak_flops import synchronize
    from gpt.pipeline import build_state, build_train_step
    from gpt.training.step_timer import StepTimer

    plan, dist = run.plan, run.dist
    sequences = build_sequences(run.corpus, run.config.data, plan.batch.block_size, plan.seed)
    loader = DataLoader(sequences, plan.batch, rank=dist.rank, device=dist.device)
    state = build_state(run.config, plan, dist)
    train_step, _ = build_train_step(run.config, plan, dist, state, loader, StepTimer(dist.device))
    with closing(train_step):
        train_step(0)
        synchronize(dist.device)
        start = time.perf_counter()
        train_step(1)
        synchronize(dist.device)
        seconds = time.perf_counter() - start
    peak = peak_memory(dist.device.type)
    return Probe(
        seconds_per_step=seconds,
        tokens_per_second=plan.batch.tokens_per_step / seconds,
        steps=plan.max_steps - run.start.step,
        peak_memory_bytes=None if peak is None else dist.max(peak),
    )


def describe_dry_run(run: "Run", memory: Memory, probe: Probe | None) -> dict[str, Any]:
    """Return the plan, its memory and its probe as JSON-able values."""
    facts = run.plan.to_dict()
    facts["notes"] = [*run.plan.notes, *([memory.note] if memory.note else [])]
    facts["memory"] = asdict(memory.needed) | {"total": memory.needed.total, "available": memory.available}
    if probe is not None:
        facts["probe"] = asdict(probe) | {"seconds": probe.seconds}
    return facts
