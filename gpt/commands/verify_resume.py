"""`gpt verify-resume [PRESET] [--flags]`: is a run that is killed and resumed the same as one left in peace?"""

import shutil
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from pydantic import Field

from gpt.configs.cli import PresetOverrides, has_flag, parse_over_preset
from gpt.configs.train_config import HORIZON, TrainConfig
from gpt.errors import UserError

if TYPE_CHECKING:
    from rich.console import Console

    from gpt.checkpoint.run_folder import RunFolder
    from gpt.verification.compare import Comparison
    from gpt.verification.kills import KillRecord
    from gpt.verification.plan import RunOutline
    from gpt.verification.processes import Launcher
    from gpt.verification.timings import Timings

CHECKPOINTS_PER_KILL = 2
"""How long a run is made, where its length was left to us."""
ERROR_PREFIX = "gpt: error: "
"""What `gpt` puts before what the user can mend."""


class VerifyResumeCommand(PresetOverrides):
    """Train a reference, then the same run killed again and again, and compare every bit.

    The two lie in a folder of their own beside --run-dir. Every value below is the preset's own, but that every step
    is reported; and a preset's run is made long enough for its kills, unless a horizon is given.
    """

    kills: int = Field(10, ge=1, le=100_000)
    """How often the run is killed."""
    kill_seed: int = Field(0, ge=0)
    """Decides where."""
    ranks: int = Field(1, ge=1, le=1024)
    """Processes that train; several are started by torchrun."""
    keep: bool = False
    """Keep the folder of the two runs, though they do not differ."""


def run(argv: Sequence[str]) -> int:
    """Parse, train twice and compare; 1 if the runs differ, or the killed one cannot be resumed."""
    command = parse_over_preset(VerifyResumeCommand, argv, verb="verify-resume")
    if sys.platform != "linux":
        raise UserError("verify-resume ends processes as only Linux does: run it there")
    own_length = command.config is not None or any(has_flag(argv, name) for name in HORIZON)

    from rich.console import Console

    console = Console(soft_wrap=True, highlight=False, markup=False)
    config = _to_verify(command, own_length=own_length)
    folder = command.run_dir.with_name(f"{command.run_dir.name}-verify-resume")
    _make(folder)
    if config.max_steps != command.max_steps:
        console.print(
            f"{config.max_steps:,} steps instead of {command.max_steps:,}: {CHECKPOINTS_PER_KILL} checkpoints for each "
            "kill; --max-steps sets another length"
        )
    alike = _verify(command, config, folder, console)
    if alike and not command.keep:
        shutil.rmtree(folder)
    else:
        console.print(f"both runs are in {folder}")
    return 0 if alike else 1


def _to_verify(command: VerifyResumeCommand, *, own_length: bool) -> TrainConfig:
    config = command.as_train_config()
    enough = CHECKPOINTS_PER_KILL * command.kills * config.checkpoint.interval
    return config.model_copy(
        update={
            "log": config.log.model_copy(update={"interval": 1}),
            "max_steps": config.max_steps if own_length else max(config.max_steps, enough),
            "resume": "auto" if config.resume == "never" else config.resume,
        }
    )


def _make(folder: Path) -> None:
    try:
        folder.mkdir(parents=True)
    except FileExistsError as error:
        raise UserError(f"{folder} is there already, from an earlier time; delete it") from error
    except OSError as error:
        raise UserError(f"{folder} cannot be made: {error.strerror}; name another --run-dir") from error


def _verify(command: VerifyResumeCommand, config: TrainConfig, folder: Path, console: "Console") -> bool:
    """Train both runs, show the kills and the verdict; whether the runs are the same."""
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
    outline = _outline(config, reference)
    console.print(
        f"reference: {plural(outline.last_step - outline.first_step, 'step')} on {plural(command.ranks, 'rank')} in "
        f"{timings.total:.1f} s, {timings.start_up:.1f} s of them before the first report"
    )

    def report(number: int, kill: "KillRecord") -> None:
        lost = plural(kill.lost_steps, "step")
        console.print(f"kill {number}: {kill.phase.value}, after step {kill.step}; {lost} lost")

    log = folder / "resumed.log"
    plan = plan_kills(command.kill_seed, command.kills, outline)
    arguments = ["train", "--config", str(saved), "--run-dir", str(resumed.path)]
    try:
        kills = kill_and_resume(lambda: launch(arguments, log), resumed, plan, outline, timings, report)
    except UserError as error:
        console.print(f"the killed run does not go on: {error}; its last words in {log}: {_last_words(log)}")
        return False
    if len(kills) < command.kills:
        console.print(
            f"the run came to its end after {plural(len(kills), 'kill')}; a larger --max-steps has room for more"
        )
    _show_kills(console, kills, outline)
    return _show_verdict(console, compare(reference, resumed))


def _train_reference(launch: "Launcher", folder: "RunFolder", arguments: list[str]) -> "Timings":
    """The run that nobody kills.

    Raises:
        UserError: it failed.
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
    said = _last_words(log)
    if said.startswith(ERROR_PREFIX):  # nothing has been trained, and the same command should be able to start again
        shutil.rmtree(log.parent)
        raise UserError(said.removeprefix(ERROR_PREFIX))
    raise UserError(f"the reference ended with status {process.poll()}; see {log}")


def _last_words(log: Path) -> str:
    """The line that says what went wrong, else the last one."""
    lines = log.read_text(encoding="utf-8", errors="replace").split("\n")
    said = [line for line in lines if line.startswith(ERROR_PREFIX)] or [line for line in lines if line.strip()]
    return said[-1] if said else "none"


def _outline(config: TrainConfig, reference: "RunFolder") -> "RunOutline":
    """What the reference tells of the run; the corpus's size tells where epochs end."""
    from gpt.checkpoint.manifest import PROGRESS, VAL_LOSS
    from gpt.run import open_run
    from gpt.utils.atomic_io import read_json, read_jsonl
    from gpt.verification.plan import RunOutline
    from gpt.verification.watcher import TRAIN_LOSS

    records = list(read_jsonl(reference.metrics))
    steps = [record["step"] for record in records if TRAIN_LOSS in record]
    unused = reference.path.with_name("planned")
    with open_run(config.model_copy(update={"run_dir": unused, "micro_batch_size": 1}), dry_run=True) as layout:
        per_epoch = layout.plan.windows_per_epoch
    progress = read_json(reference.committed()[-1] / PROGRESS)
    per_step = progress["tokens"] // progress["step"] // config.model.block_size
    return RunOutline(
        first_step=steps[0] - 1,
        last_step=steps[-1],
        checkpoint_interval=config.checkpoint.interval,
        evaluated_steps=frozenset(record["step"] for record in records if VAL_LOSS in record),
        epoch_ends=frozenset(-(-end // per_step) for end in range(per_epoch, steps[-1] * per_step, per_epoch)),
    )


def _show_kills(console: "Console", kills: "Sequence[KillRecord]", outline: "RunOutline") -> None:
    from rich.table import Table

    from gpt.verification.plan import Phase

    table = Table("killed", "kills", "most steps lost", box=None, pad_edge=False, padding=(0, 2, 0, 0))
    for phase in Phase:
        lost = [kill.lost_steps for kill in kills if kill.phase is phase]
        if lost or phase is not Phase.EPOCH_BOUNDARY or outline.epoch_ends:
            table.add_row(phase.value, str(len(lost)), str(max(lost, default="")))
    console.print(table)
    interval = outline.checkpoint_interval or outline.last_step
    most = max((kill.lost_steps for kill in kills), default=0)
    console.print(f"most steps lost by a kill: {most}; between two checkpoints lie {interval}")


def _show_verdict(console: "Console", found: "Comparison") -> bool:
    from gpt.utils.helper import format_si, plural

    if found.differences:
        first = found.differences[0]
        console.print(f"first difference: {first}")
        console.print(f"values that differ: {sum(difference.n_values for difference in found.differences):,}")
        return False
    console.print(
        f"0 differing bits in {plural(found.n_losses, 'loss', 'es')}, {plural(found.n_evaluations, 'evaluation')}, "
        f"{plural(found.n_samples, 'sample')}, and the last checkpoint's {plural(found.n_tensors, 'tensor')} of "
        f"weights and optimizer ({format_si(found.tensor_bytes)}B) and progress"
    )
    console.print("(what is drawn is addressed by seed and position: there is no generator's state to compare)")
    return True
