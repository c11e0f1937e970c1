"""`gpt verify-resume [PRESET] [--flags]`: check that a run that is killed and resumed is bit-exact."""

import itertools
import shutil
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import Field

from gpt.commands.output import build_console, print_json
from gpt.configs.arguments import has_flag
from gpt.configs.cli import JsonOutput, PresetOverrides, parse_over_preset
from gpt.configs.train_config import HORIZON, TrainConfig
from gpt.errors import UserError

if TYPE_CHECKING:
    from gpt.checkpoint.run_folder import RunFolder
    from gpt.utils.terminal import RunConsole
    from gpt.verification.compare import Comparison
    from gpt.verification.kills import KillRecord
    from gpt.verification.plan import RunOutline
    from gpt.verification.processes import Launcher
    from gpt.verification.timings import Timings

SAVES_PER_INTERVAL = 3
"""Saves by the clock in the time of a checkpoint interval, in every other launch of the killed run."""
CHECKPOINTS_PER_KILL = 2
"""Checkpoints that a preset's run is extended to, for each kill."""
ERROR_PREFIX = "gpt: error: "
"""Prefix of the line that `gpt` prints for a UserError."""


class VerifyResumeCommand(JsonOutput, PresetOverrides):
    """Train a reference run, then kill and resume the same run again and again, and compare the two bit by bit.

    Most kills are SIGKILL; every third is a graceful stop by SIGTERM or SIGINT. Every other launch also saves by the
    clock.
    Both runs are written to a folder of their own beside --run-dir. Every default below is the preset's value, with
    two exceptions: every step is logged, and a preset's run is extended for its kills unless you set its length.
    """

    kills: int = Field(10, ge=1, le=100_000)
    """Number of kills."""
    kill_seed: int = Field(0, ge=0)
    """Seed of the steps and phases to kill in."""
    ranks: int = Field(1, ge=1, le=1024)
    """Processes that train together; more than one are started by torchrun."""
    keep: bool = False
    """Keep the folder of the two runs even if they are equal."""


@dataclass(frozen=True)
class ResumeVerdict:
    """Result of killing and resuming a run."""

    outline: "RunOutline"
    kills: "Sequence[KillRecord]"
    comparison: "Comparison | None"
    """Comparison with the reference; None if the killed run could not be resumed."""
    error: str = ""
    """Reason why the killed run could not be resumed."""

    @property
    def bit_exact(self) -> bool:
        """The killed run was resumed to its end and equals the reference."""
        return self.comparison is not None and not self.comparison.differences

    @property
    def max_lost_steps(self) -> int:
        """Steps that the costliest kill lost."""
        return max((kill.lost_steps for kill in self.kills), default=0)

    def to_dict(self) -> dict[str, Any]:
        """Return the verdict as JSON-able values."""
        values: dict[str, Any] = {
            "bit_exact": self.bit_exact,
            "error": self.error or None,
            "steps": self.outline.last_step - self.outline.first_step,
            "checkpoint_interval": self.outline.checkpoint_interval,
            "kills": [
                {
                    "phase": kill.phase.value,
                    "signal": kill.signal.name,
                    "step": kill.step,
                    "lost_steps": kill.lost_steps,
                }
                for kill in self.kills
            ],
            "max_lost_steps": self.max_lost_steps,
        }
        compared = self.comparison
        if compared is not None:
            values |= {
                "losses": compared.n_losses,
                "evaluations": compared.n_evaluations,
                "samples": compared.n_samples,
                "rollbacks": compared.n_rollbacks,
                "tensors": compared.n_tensors,
                "tensor_bytes": compared.tensor_bytes,
                "differing_values": sum(difference.n_values for difference in compared.differences),
                "first_difference": str(compared.differences[0]) if compared.differences else None,
            }
        return values


def run(argv: Sequence[str]) -> int:
    """Train both runs and compare them; return 1 if they differ, or if the killed one cannot be resumed."""
    command = parse_over_preset(VerifyResumeCommand, argv, verb="verify-resume")
    if sys.platform != "linux":
        raise UserError(f"verify-resume needs Linux, whose /proc lists the processes to kill; this is {sys.platform}")
    sets_length = command.config is not None or any(has_flag(argv, name) for name in HORIZON)

    console = build_console(stderr=command.as_json)
    config = _build_config(command, sets_length=sets_length)
    folder = command.run_dir.with_name(f"{command.run_dir.name}-verify-resume")
    _create_folder(folder)
    if config.max_steps != command.max_steps:
        console.print(
            f"{config.max_steps:,} steps instead of {command.max_steps:,}: {CHECKPOINTS_PER_KILL} checkpoints for each "
            "kill; --max-steps sets another length"
        )
    verdict = _verify(command, config, folder, console)
    keep = command.keep or not verdict.bit_exact
    if keep:
        console.print(f"both runs are in {folder}")
    else:
        shutil.rmtree(folder)
    if command.as_json:
        print_json(verdict.to_dict() | {"ranks": command.ranks, "folder": str(folder) if keep else None})
    return 0 if verdict.bit_exact else 1


def _build_config(command: VerifyResumeCommand, *, sets_length: bool) -> TrainConfig:
    config = command.as_train_config()
    min_steps = CHECKPOINTS_PER_KILL * command.kills * config.checkpoint.interval
    return config.model_copy(
        update={
            "log": config.log.model_copy(update={"interval": 1}),
            "max_steps": config.max_steps if sets_length else max(config.max_steps, min_steps),
            "resume": "auto" if config.resume == "never" else config.resume,
        }
    )


def _create_folder(folder: Path) -> None:
    try:
        folder.mkdir(parents=True)
    except FileExistsError as error:
        raise UserError(f"{folder} exists already, from an earlier verify-resume; delete it") from error
    except OSError as error:
        raise UserError(f"{folder} cannot be created: {error.strerror}; name another --run-dir") from error


def _verify(command: VerifyResumeCommand, config: TrainConfig, folder: Path, console: "RunConsole") -> ResumeVerdict:
    """Train the reference, kill and resume the second run, compare the two, and print what happens."""
    from gpt.checkpoint.run_folder import RunFolder
    from gpt.utils.helper import plural
    from gpt.verification.compare import compare
    from gpt.verification.kills import kill_and_resume
    from gpt.verification.plan import plan_kills
    from gpt.verification.processes import launcher_for

    saved = folder / "config.json"
    saved.write_text(config.saved_json(), encoding="utf-8")
    reference, resumed = (RunFolder(folder / name) for name in ("reference", "resumed"))
    launch = launcher_for(command.ranks)
    timings = _train_reference(launch, reference, ["train", "--config", str(saved)])
    outline = _outline_run(config, reference)
    console.print(
        f"reference: {plural(outline.last_step - outline.first_step, 'step')} on {plural(command.ranks, 'rank')} in "
        f"{timings.total:.1f} s, {timings.start_up:.1f} s of them before the first report"
    )

    kills: list[KillRecord] = []

    def report(number: int, kill: "KillRecord") -> None:
        kills.append(kill)
        lost = plural(kill.lost_steps, "step")
        console.print(f"kill {number}: {kill.phase.value} by {kill.signal.name}, after step {kill.step}; {lost} lost")

    log = folder / "resumed.log"
    plan = plan_kills(command.kill_seed, command.kills, outline)
    arguments = ["train", "--config", str(saved), "--run-dir", str(resumed.path)]
    minutes = timings.median_step * max(1, outline.checkpoint_interval / SAVES_PER_INTERVAL) / 60
    save_flags = itertools.cycle([[], ["--checkpoint.every-minutes", f"{minutes:.9f}"]])
    try:
        kill_and_resume(lambda: launch([*arguments, *next(save_flags)], log), resumed, plan, outline, timings, report)
    except UserError as error:
        reason = f"{error}; last line of {log}: {_read_error_line(log)}"
        console.print(f"the killed run cannot be resumed: {reason}")
        return ResumeVerdict(outline, kills, None, reason)
    if len(kills) < command.kills:
        console.print(f"the run finished after {plural(len(kills), 'kill')}; a larger --max-steps leaves time for more")
    verdict = ResumeVerdict(outline, kills, compare(reference, resumed))
    _print_kills(console, verdict)
    _print_comparison(console, verdict)
    if not verdict.bit_exact and (hint := suggest_flag(config, reference)):
        console.print(hint)
    return verdict


def _train_reference(launch: "Launcher", folder: "RunFolder", arguments: list[str]) -> "Timings":
    """Train the reference run, which is not killed, and measure its timings.

    Raises:
        UserError: the run failed.
    """
    from gpt.verification.timings import measure_timings

    log = folder.path.with_name(f"{folder.path.name}.log")
    process = launch([*arguments, "--run-dir", str(folder.path)], log)
    try:
        timings = measure_timings(process, folder)
    finally:
        process.kill()
    if process.poll() == 0:
        return timings
    line = _read_error_line(log)
    if line.startswith(ERROR_PREFIX):  # a user's mistake: remove the folder, so that the corrected command can start
        shutil.rmtree(log.parent)
        raise UserError(line.removeprefix(ERROR_PREFIX))
    raise UserError(f"the reference run ended with status {process.poll()}; see {log}")


def _read_error_line(log: Path) -> str:
    """Return the last error line of a log, or else its last line."""
    lines = [line for line in log.read_text(encoding="utf-8", errors="replace").split("\n") if line.strip()]
    errors = [line for line in lines if line.startswith(ERROR_PREFIX)]
    return (errors or lines or ["none"])[-1]


def _outline_run(config: TrainConfig, reference: "RunFolder") -> "RunOutline":
    """Read the steps of the reference run from its metrics, and derive its epoch boundaries from the plan."""
    from gpt.checkpoint.manifest import PROGRESS, VAL_LOSS
    from gpt.run import open_run
    from gpt.utils.atomic_io import read_json, read_jsonl
    from gpt.verification.plan import RunOutline
    from gpt.verification.watcher import TRAIN_LOSS

    records = list(read_jsonl(reference.metrics))
    steps = [record["step"] for record in records if TRAIN_LOSS in record]
    unused = reference.path.with_name("planned")
    with open_run(config.model_copy(update={"run_dir": unused, "micro_batch_size": 1}), dry_run=True) as planned:
        per_epoch = planned.plan.windows_per_epoch
    progress = read_json(reference.list_checkpoints()[-1] / PROGRESS)
    per_step = progress["tokens"] // progress["step"] // config.model.block_size
    return RunOutline(
        first_step=steps[0] - 1,
        last_step=steps[-1],
        checkpoint_interval=config.checkpoint.interval,
        evaluated_steps=frozenset(record["step"] for record in records if VAL_LOSS in record),
        epoch_ends=frozenset(-(-end // per_step) for end in range(per_epoch, steps[-1] * per_step, per_epoch)),
    )


def suggest_flag(config: TrainConfig, reference: "RunFolder") -> str:
    """Return a hint for runs that differ although nothing is wrong with them; empty if they should not."""
    from gpt.checkpoint.manifest import read_checkpoint_manifest

    ran_on_gpu = "gpu" in read_checkpoint_manifest(reference.list_checkpoints()[-1]).environment
    if config.parallel.reproducible or not ran_on_gpu:
        return ""
    return "a GPU's kernels may add in any order; with --parallel.reproducible they add in one order"


def _print_kills(console: "RunConsole", verdict: ResumeVerdict) -> None:
    from gpt.verification.plan import KillPhase

    outline = verdict.outline
    rows = [("killed", "kills", "most steps lost")]
    for phase in KillPhase:
        lost = [kill.lost_steps for kill in verdict.kills if kill.phase is phase]
        if lost or phase is not KillPhase.EPOCH_BOUNDARY or outline.epoch_ends:
            rows.append((phase.value, str(len(lost)), str(max(lost, default=""))))
    console.write_table(rows)
    interval = outline.checkpoint_interval or outline.last_step
    console.print(f"most steps lost by a kill: {verdict.max_lost_steps}; steps between checkpoints: {interval}")


def _print_comparison(console: "RunConsole", verdict: ResumeVerdict) -> None:
    from gpt.utils.helper import format_si, plural

    compared = verdict.comparison
    assert compared is not None
    if compared.differences:
        console.print(f"first difference: {compared.differences[0]}")
        console.print(f"values that differ: {sum(difference.n_values for difference in compared.differences):,}")
        return
    rollbacks = f", {plural(compared.n_rollbacks, 'rollback')}" if compared.n_rollbacks else ""
    console.print(
        f"0 differing bits in {plural(compared.n_losses, 'loss', 'es')}, "
        f"{plural(compared.n_evaluations, 'evaluation')}, {plural(compared.n_samples, 'sample')}{rollbacks}, and the "
        f"last checkpoint's {plural(compared.n_tensors, 'tensor')} of weights and optimizer state "
        f"({format_si(compared.tensor_bytes, 'B')}) and progress"
    )
    console.print("(randomness is addressed by seed and position, so there is no generator state to compare)")
