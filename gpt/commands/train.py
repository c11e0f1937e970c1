"""`gpt train [PRESET] [--flags]`: train a model, resume a run, or only print its plan."""

from collections.abc import Sequence
from typing import Self

from pydantic import model_validator

from gpt.configs.cli import JsonOutput, PresetOverrides, parse_over_preset

INCOMPLETE_RECORD = "incomplete record"
EXIT_STATUSES = {"finished": 0, "SIGINT": 130, "SIGTERM": 143}
"""Exit status by the reason for which training ended, as shells report signals; any other reason, such as a
record with lines that the disk refused, is 1."""


class TrainCommand(JsonOutput, PresetOverrides):
    """Train a GPT. Every default below is the preset's value."""

    dry_run: bool = False
    """Resolve, check and print the plan; train nothing."""

    @model_validator(mode="after")
    def _require_dry_run(self) -> Self:
        if self.as_json and not self.dry_run:
            raise ValueError("--json needs --dry-run; a training run writes its metrics to metrics.jsonl")
        return self


def parse_train(argv: Sequence[str]) -> TrainCommand:
    """Parse `[PRESET] [--flags]`."""
    return parse_over_preset(TrainCommand, argv, verb="train")


def run(argv: Sequence[str]) -> int:
    """Parse the flags, then train; torch is imported only once the flags are valid."""
    command = parse_train(argv)
    config = command.as_train_config()

    from gpt.commands.output import print_json
    from gpt.pipeline import build_trainer
    from gpt.run import open_run
    from gpt.training.sinks.console import RunConsole, build_plan_table

    reason = "finished"
    with open_run(config, dry_run=command.dry_run) as opened:
        console = RunConsole(emoji=False) if opened.dist.is_main else None
        if command.dry_run and command.as_json:
            if console:
                print_json(opened.plan.to_dict())
        elif opened.finished_at is not None:
            if console:
                message = f"{config.run_dir} has finished at step {opened.finished_at}; a larger --max-steps trains on"
                console.print(message, markup=False, highlight=False, soft_wrap=True)
        elif command.dry_run:
            if console:
                console.print(build_plan_table(opened.plan))
        else:
            with opened.dist.report_lost_ranks():
                trainer = build_trainer(opened, console)
                reason = trainer.train()
                if trainer.is_record_incomplete:
                    reason = INCOMPLETE_RECORD
    opened.dist.close()
    return EXIT_STATUSES.get(reason, 1)
