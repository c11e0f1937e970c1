"""`gpt verify RUN_DIR`: compare every checkpoint of a run with its digests."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from gpt.configs.base import Config
from gpt.configs.cli import POSITIONAL, parse
from gpt.errors import UserError

UNFINISHED, DAMAGED, OK = "unfinished", "damaged", "ok"


class VerifyCommand(Config):
    """Compare every checkpoint of a run with its digests."""

    run_dir: Annotated[Path, POSITIONAL]
    """A run's folder."""


@dataclass(frozen=True)
class Verdict:
    """On one checkpoint."""

    name: str
    size: int
    """Bytes."""
    val_loss: float | None
    state: str
    """ok, damaged or unfinished."""
    reason: str = ""
    """The file that is damaged, and how."""


def run(argv: Sequence[str]) -> int:
    """Verify and print; 1 if a checkpoint is damaged."""
    command = parse(VerifyCommand, argv, prog="gpt verify")

    from gpt.checkpoint.run_folder import RunFolder

    folder = RunFolder(command.run_dir)
    if not (folder.config.is_file() or folder.checkpoints.is_dir()):
        reason = "is no run: it holds no config.json" if command.run_dir.is_dir() else "no such folder"
        raise UserError(f"RUN_DIR {command.run_dir}: {reason}; name the --run-dir of a run")
    found = folder.checkpoints.iterdir() if folder.checkpoints.is_dir() else ()
    verdicts = [_judge(path) for path in sorted(found, key=lambda path: path.name.lstrip("."))]
    _show([verdict for verdict in verdicts if verdict is not None])
    return int(any(verdict is not None and verdict.state == DAMAGED for verdict in verdicts))


def _judge(path: Path) -> Verdict | None:
    """None of what is no checkpoint, and was none."""
    from gpt.checkpoint.manifest import VAL_LOSS, verify
    from gpt.utils.atomic_io import is_leftover

    if is_leftover(path):
        return Verdict(path.name, _size(path), None, UNFINISHED, "being written or removed, or left by a run that died")
    if not path.name.startswith("step_"):
        return None
    try:
        manifest = verify(path)
    except UserError as error:
        return Verdict(path.name, _size(path), None, DAMAGED, str(error))
    return Verdict(path.name, _size(path), manifest.metrics.get(VAL_LOSS), OK)


def _size(path: Path) -> int:
    return sum(file.lstat().st_size for file in path.iterdir()) if path.is_dir() and not path.is_symlink() else 0


def _show(verdicts: Sequence[Verdict]) -> None:
    from rich.console import Console
    from rich.table import Table

    from gpt.utils.helper import format_si, plural, printable

    console = Console()
    table = Table("checkpoint", "size", "val/loss", "state", box=None, pad_edge=False, padding=(0, 2, 0, 0))
    for verdict in verdicts:
        loss = "" if verdict.val_loss is None else f"{verdict.val_loss:.4f}"
        table.add_row(printable(verdict.name), f"{format_si(verdict.size)}B", loss, verdict.state)
    console.print(table)
    for verdict in verdicts:
        if verdict.reason:
            console.print(printable(f"{verdict.name}: {verdict.reason}"), markup=False, highlight=False, soft_wrap=True)
    counts = ", ".join(f"{sum(v.state == state for v in verdicts)} {state}" for state in (OK, DAMAGED, UNFINISHED))
    console.print(f"{plural(len(verdicts), 'checkpoint')}: {counts}", highlight=False, soft_wrap=True)
