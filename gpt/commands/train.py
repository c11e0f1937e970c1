"""`gpt train [PRESET] [--flags]`: train, continue, or only plan a run."""

from collections.abc import Sequence

from gpt.configs.cli import parse_train

STATUS = {"SIGINT": 130, "SIGTERM": 143}
"""Exit status after a signal, as shells report one; any other early stop is 1."""


def run(argv: Sequence[str]) -> int:
    """Parse, then train; torch is imported only once the flags are known to be sound."""
    config, dry_run = parse_train(argv)

    from gpt.pipeline import build_trainer
    from gpt.run import open_run
    from gpt.training.sinks.console import RunConsole, plan_table
    from gpt.training.trainer import FINISHED

    with open_run(config, dry_run=dry_run) as layout:
        console = RunConsole() if layout.dist.is_main else None
        if layout.finished_at is not None:
            reason = FINISHED
            if console:
                console.print(
                    f"{config.run_dir} has finished at step {layout.finished_at}; a larger --max-steps trains on",
                    markup=False,
                    highlight=False,
                    soft_wrap=True,
                )
        elif dry_run:
            reason = FINISHED
            if console:
                console.print(plan_table(layout.plan))
        else:
            with layout.dist.report_lost_ranks():
                reason = build_trainer(layout, console).train()
    layout.dist.close()
    return STATUS.get(reason, 0 if reason == FINISHED else 1)
