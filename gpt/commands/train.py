"""`gpt train [PRESET] [--flags]`: train, continue, or only plan a run."""

import signal
from collections.abc import Sequence

from gpt.configs.cli import parse_train


def run(argv: Sequence[str]) -> int:
    """Parse, then train; torch is imported only once the flags are known to be sound."""
    config, dry_run = parse_train(argv)

    from gpt.pipeline import build, lay_out
    from gpt.training.sinks.console import RunConsole, plan_table
    from gpt.training.trainer import FINISHED

    layout = lay_out(config, dry_run=dry_run)
    console = RunConsole() if layout.dist.is_main else None
    if layout.finished_at is not None:
        reason = FINISHED
        if console:
            console.print(
                f"{config.run_dir} has finished at step {layout.finished_at}; a larger --max-steps trains on",
                soft_wrap=True,
            )
    elif dry_run:
        reason = FINISHED
        if console:
            console.print(plan_table(layout.plan))
    else:
        reason = build(layout, console).train()
    layout.dist.close()
    return 0 if reason == FINISHED else 128 + signal.Signals[reason]
