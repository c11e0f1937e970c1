"""`gpt train [PRESET] [--flags]`: train, resume, or only plan a run."""

from collections.abc import Sequence

from gpt.configs.cli import parse_train

EXIT_STATUSES = {"finished": 0, "SIGINT": 130, "SIGTERM": 143}
"""Exit status by the reason for which training ended, as shells report signals; any other reason is 1."""


def run(argv: Sequence[str]) -> int:
    """Parse, then train; torch is imported only once the flags are valid."""
    config, dry_run = parse_train(argv)

    from gpt.pipeline import build_trainer
    from gpt.run import open_run
    from gpt.training.sinks.console import RunConsole, plan_table

    reason = "finished"
    with open_run(config, dry_run=dry_run) as opened:
        console = RunConsole() if opened.dist.is_main else None
        if opened.finished_at is not None:
            if console:
                message = f"{config.run_dir} has finished at step {opened.finished_at}; a larger --max-steps trains on"
                console.print(message, markup=False, highlight=False, soft_wrap=True)
        elif dry_run:
            if console:
                console.print(plan_table(opened.plan))
        else:
            with opened.dist.report_lost_ranks():
                reason = build_trainer(opened, console).train()
    opened.dist.close()
    return EXIT_STATUSES.get(reason, 1)
