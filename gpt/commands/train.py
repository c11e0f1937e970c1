"""`gpt train [PRESET] [--flags]`: train, continue, or only plan a run."""

import signal
from collections.abc import Sequence

from rich.console import Console
from rich.table import Table

from gpt.configs.cli import parse_train
from gpt.configs.run_plan import RunPlan
from gpt.utils.helper import plural, si


def run(argv: Sequence[str]) -> int:
    """Parse, then train; torch is imported only once the flags are known to be sound."""
    config, dry_run = parse_train(argv)

    from gpt.pipeline import build, lay_out
    from gpt.training.trainer import FINISHED

    layout = lay_out(config, dry_run=dry_run)
    console = Console() if layout.dist.is_main else None
    if layout.finished_at is not None:
        if console:
            console.print(
                f"{config.run_dir} has finished at step {layout.finished_at}; a larger --max-steps trains on",
                soft_wrap=True,
            )
        layout.dist.close()
        return 0
    if console:
        console.print(plan_table(layout.plan))
    if dry_run:
        layout.dist.close()
        return 0
    reason = build(layout, console).train()
    layout.dist.close()
    if console:
        if reason == FINISHED:
            console.print(f"try it: gpt sample {config.run_dir} --prompt TEXT", highlight=False, soft_wrap=True)
        else:
            console.print("the same command continues the run", highlight=False)
    return 0 if reason == FINISHED else 128 + signal.Signals[reason]


def plan_table(plan: RunPlan) -> Table:
    """What will happen, for people."""
    machine, batch, corpus = plan.machine, plan.batch, plan.corpus
    processes = plural(machine.world_size, "process").replace("processs", "processes")
    rows = {
        "machine": f"{machine.device_name} ({machine.device}), {processes}, {plan.dtype}",
        "data": f"{si(corpus.train_tokens)} training tokens, vocabulary {corpus.vocab_size:,}",
        "validation": f"{si(corpus.val_tokens)} tokens, {si(corpus.val_bytes)}B of text, "
        f"{plural(corpus.val_documents, 'document')}",
        "step": f"{batch.tokens_per_step:,} tokens: {batch.grad_accum_steps} x {batch.micro_batch_size} sequences "
        f"of {batch.block_size} per process",
        "run": f"{plan.max_steps:,} steps, {si(plan.max_steps * batch.tokens_per_step)} tokens, "
        f"{plan.epochs:.2f} epochs",
        "learning rate": f"{plan.lr.schedule}, up to {plan.lr.max_lr:g} after {plan.lr.warmup_steps} steps",
    }
    table = Table.grid(padding=(0, 2))
    for name, value in rows.items():
        table.add_row(name, value)
    for note in plan.notes:
        table.add_row("note", note)
    return table
