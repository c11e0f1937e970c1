"""`gpt verify RUN_DIR`: compare every checkpoint of a run with its SHA-256 digests."""

import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated

from gpt.commands.output import build_console, print_json
from gpt.configs.base import FilePath
from gpt.configs.cli import JsonOutput, parse
from gpt.configs.fields import POSITIONAL
from gpt.errors import UserError

UNFINISHED, DAMAGED, OK = "unfinished", "damaged", "ok"


class VerifyCommand(JsonOutput):
    """Compare every checkpoint of a run with its SHA-256 digests."""

    run_dir: Annotated[FilePath, POSITIONAL]
    """Folder of the run."""


@dataclass(frozen=True)
class Verdict:
    """Result for one checkpoint."""

    name: str
    size_bytes: int
    val_loss: float | None
    state: str
    """ok, damaged or unfinished."""
    reason: str = ""
    """Damaged file and its damage, or the cause of an unfinished checkpoint."""


def run(argv: Sequence[str]) -> int:
    """Verify and print every checkpoint; return 1 if one is damaged."""
    command = parse(VerifyCommand, argv, prog="gpt verify")

    verdicts = verify_checkpoints(command.run_dir)
    counts = {state: sum(verdict.state == state for verdict in verdicts) for state in (OK, DAMAGED, UNFINISHED)}
    if command.as_json:
        print_json({"checkpoints": [asdict(verdict) for verdict in verdicts], **counts})
    else:
        _print_table(verdicts, counts)
    return int(counts[DAMAGED] > 0)


def verify_checkpoints(run_dir: Path) -> list[Verdict]:
    """Verify the checkpoints in a run's folder, in order of their steps.

    Raises:
        UserError: `run_dir` is no run.
    """
    from gpt.checkpoint.run_folder import RunFolder, no_run_error

    folder = RunFolder(run_dir)
    if not (folder.config.is_file() or folder.checkpoints.is_dir()):
        raise no_run_error(run_dir)
    paths = list(folder.checkpoints.iterdir()) if folder.checkpoints.is_dir() else []
    paths.sort(key=lambda path: path.name.lstrip("."))
    return [verdict for path in paths if (verdict := _verify_path(path)) is not None]


def _verify_path(path: Path) -> Verdict | None:
    """Return the verdict on a path among the checkpoints; None if it is none, or its run has just removed it."""
    from gpt.checkpoint.manifest import VAL_LOSS, verify
    from gpt.utils.atomic_io import is_leftover

    if is_leftover(path):
        reason = "being written or removed, or left over from a killed run"
        verdict = Verdict(path.name, _measure_size(path), None, UNFINISHED, reason)
    elif path.name.startswith("step_"):
        try:
            val_loss = verify(path).metrics.get(VAL_LOSS)
            verdict = Verdict(path.name, _measure_size(path), val_loss, OK)
        except UserError as error:
            verdict = Verdict(path.name, _measure_size(path), None, DAMAGED, str(error))
    else:
        return None
    return verdict if os.path.lexists(path) else None


def _measure_size(path: Path) -> int:
    """Return the bytes of the files in a folder; 0 for a link or a file, and for a folder that is removed meanwhile."""
    if path.is_symlink() or not path.is_dir():
        return 0
    try:
        return sum(file.lstat().st_size for file in path.iterdir())
    except FileNotFoundError:
        return 0


def _print_table(verdicts: Sequence[Verdict], counts: dict[str, int]) -> None:
    from gpt.utils.helper import format_si, plural, printable

    rows = [("checkpoint", "size", "val/loss", "state")]
    for verdict in verdicts:
        loss = "" if verdict.val_loss is None else f"{verdict.val_loss:.4f}"
        rows.append((printable(verdict.name), format_si(verdict.size_bytes, "B"), loss, verdict.state))
    console = build_console()
    console.write_table(rows)
    for verdict in verdicts:
        if verdict.reason:
            console.write_text(printable(f"{verdict.name}: {verdict.reason}"))
    summary = ", ".join(f"{count} {state}" for state, count in counts.items())
    console.write_text(f"{plural(len(verdicts), 'checkpoint')}: {summary}")
