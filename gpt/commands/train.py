"""`gpt train [PRESET] [--flags]`: train a model, resume a run, or only print its plan."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Self

from pydantic import model_validator

from gpt.configs.cli import JsonOutput, PresetOverrides, parse_over_preset

if TYPE_CHECKING:
    from gpt.configs.gpt_config import GPTConfig

INCOMPLETE_RECORD = "incomplete record"
EXIT_STATUSES = {"finished": 0, "SIGINT": 130, "SIGTERM": 143}
"""Exit status by the reason for which training ended, as shells report signals; any other reason, such as a
record with lines that the disk refused, is 1."""


class TrainCommand(JsonOutput, PresetOverrides):
    """Train a GPT. Every default below is the preset's value."""

    dry_run: bool = False
    """Resolve, check and print the plan; train nothing."""
    probe: bool = False
    """Train two steps, keep nothing of them, and estimate the time of the run; needs --dry-run."""

    @model_validator(mode="after")
    def _require_dry_run(self) -> Self:
        if self.as_json and not self.dry_run:
            raise ValueError("--json needs --dry-run; a training run writes its metrics to metrics.jsonl")
        if self.probe and not self.dry_run:
            raise ValueError("--probe needs --dry-run; a training run shows its remaining time")
        return self


def parse_train(argv: Sequence[str]) -> TrainCommand:
    """Parse `[PRESET] [--flags]`."""
    return parse_over_preset(TrainCommand, argv, verb="train", describe_weights=_describe_weights)


def _describe_weights(source: str) -> "tuple[GPTConfig, str] | None":
    from gpt.interop.weights import describe_weights

    return describe_weights(source)


def run(argv: Sequence[str]) -> int:
    """Parse the flags, then train; torch is imported only once the flags are valid."""
    command = parse_train(argv)
    config = command.as_train_config()

    from gpt.commands.dry_run import describe_dry_run, probe_steps
    from gpt.commands.output import print_json
    from gpt.machine.cuda_runtime import name_nondeterministic_operator
    from gpt.pipeline import build_trainer, compare_memory
    from gpt.run import open_run
    from gpt.training.sinks.console.lines import one_line
    from gpt.training.sinks.console.plan_screen import print_plan
    from gpt.utils.terminal import RunConsole

    reason = "finished"
    with open_run(config, dry_run=command.dry_run) as opened:
        console = RunConsole() if opened.dist.is_main else None
        if opened.finished_at is not None and not command.as_json:
            if console:
                message = f"{config.run_dir} has finished at step {opened.finished_at}; a larger --max-steps trains on"
                console.write_text(one_line(message))
        elif command.dry_run:
            memory, probe = compare_memory(opened), probe_steps(opened) if command.probe else None
            if console and command.as_json:
                print_json(describe_dry_run(opened, memory, probe))
            elif console:
                print_plan(console, opened.plan, memory, probe)
        else:
            with opened.dist.report_lost_ranks(), name_nondeterministic_operator():
                trainer = build_trainer(opened, console)
                reason = trainer.train()
                if trainer.is_record_incomplete:
                    reason = INCOMPLETE_RECORD
    opened.dist.close()
    return EXIT_STATUSES.get(reason, 1)
