"""Find the newest checkpoint that is valid."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from gpt.checkpoint.manifest import CheckpointManifest, NewerFormatError, verify
from gpt.errors import UserError


@dataclass(frozen=True)
class NewestValid:
    """Result of a search for the newest valid checkpoint."""

    checkpoint: Path | None
    """None if no checkpoint is valid."""
    manifest: CheckpointManifest | None
    """The checkpoint's manifest, verified."""
    skipped: tuple[tuple[Path, str], ...] = ()
    """Newer checkpoints that are damaged, newest first, each with the reason."""


def find_newest_valid(checkpoints: Sequence[Path]) -> NewestValid:
    """Verify checkpoints from the last of the list on, and return the first that is valid.

    Args:
        checkpoints: oldest first, or the most wanted last.

    Raises:
        NewerFormatError: a newer version of this program wrote one of them; it is not damaged.
        OSError: one cannot be read now, and may be readable later.
    """
    skipped: list[tuple[Path, str]] = []
    for checkpoint in reversed(checkpoints):
        try:
            return NewestValid(checkpoint, verify(checkpoint), tuple(skipped))
        except NewerFormatError:
            raise
        except UserError as error:
            skipped.append((checkpoint, str(error)))
    return NewestValid(None, None, tuple(skipped))
