"""Find the newest checkpoint that is valid."""

import errno
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from gpt.checkpoint.store import CHECKPOINT_FORMAT_VERSION, CHECKPOINT_MANIFEST, read_json, verify
from gpt.errors import UserError


@dataclass(frozen=True)
class Start:
    """Where a run begins."""

    checkpoint: Path | None
    """None: afresh."""
    damaged: tuple[tuple[Path, str], ...] = ()
    """Newer ones that are not whole, newest first, each with the reason."""


def newest_valid(checkpoints: Sequence[Path]) -> Start:
    """The last of `checkpoints` that verifies, if one does.

    Raises:
        UserError: on the way there is one that only a newer version of this program can read.
        OSError: one cannot be read, and may be another time.
    """
    damaged: list[tuple[Path, str]] = []
    for checkpoint in reversed(checkpoints):
        try:
            verify(checkpoint)
        except UserError as error:
            if _is_of_a_newer_version(checkpoint):
                raise
            damaged.append((checkpoint, str(error)))
        except OSError as error:
            if error.errno != errno.EIO:  # a disk that lost a block; anything else may pass
                raise
            damaged.append((checkpoint, f"{error.filename or checkpoint}: {error.strerror}"))
        else:
            return Start(checkpoint, tuple(damaged))
    return Start(None, tuple(damaged))


def _is_of_a_newer_version(checkpoint: Path) -> bool:
    try:
        version = read_json(checkpoint / CHECKPOINT_MANIFEST).get("format_version")
    except UserError:
        return False
    return isinstance(version, int) and version > CHECKPOINT_FORMAT_VERSION
