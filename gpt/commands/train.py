"""`gpt train [PRESET] [--flags]`: train a model, resume a run, or only print its plan."""

from collections.abc import Sequence
from typing import Self

from pydantic import model_validator

from gpt.configs.cli import JsonOutput, PresetOverrides, parse_over_preset

EXIT_STATUS = {"SIGINT": 130, "SIGTERM": 143}
"""Exit status after a signal, as shells report one; any other early stop is 1."""


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
    config, dry_run = command.as_train_config(), command.dry_run

    from gpt.commands.output import print_json
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
            if console and command.as_json:
                print_json(layout.plan.to_dict())
            elif console:
                console.print(plan_table(layout.plan))
        else:
            with layout.dist.report_lost_ranks():
                reason = build_trainer(layout, console).train()
    layout.dist.close()
    return EXIT_STATUS.get(reason, 0 if reason == FINISHED else 1)
