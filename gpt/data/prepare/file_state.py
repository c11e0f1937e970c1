"""Files that must not change between their fingerprint and the end of a preparation."""

import hashlib
import json
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from gpt.data.prepare.records import shorten
from gpt.errors import UserError
from gpt.utils.helper import sha256_of_file

RECENT_NANOSECONDS = 2 * 10**9
"""Age up to which a file may change again without another time of change, as clocks of file systems are coarse."""


@dataclass(frozen=True)
class FileState:
    """A file as it was when its content was digested."""

    path: Path
    size: int
    mtime_ns: int
    ctime_ns: int
    inode: int
    is_recent: bool
    sha256: str


class SourceChangedError(UserError):
    """Error that a file changed while it was prepared, so that nothing made of it can be used."""


def read_file_state(path: Path) -> FileState:
    """Digest a file, and record the state that it has before.

    Raises:
        UserError: the file cannot be read.
    """
    try:
        status = path.stat()
        newest = max(status.st_mtime_ns, status.st_ctime_ns)
        is_recent = time.time_ns() - newest < RECENT_NANOSECONDS
        times = (status.st_mtime_ns, status.st_ctime_ns)
        return FileState(path, status.st_size, *times, status.st_ino, is_recent, sha256_of_file(path))
    except OSError as error:
        raise UserError(f"{shorten(path)}: cannot be read: {error.strerror}") from error


def require_unchanged(states: Iterable[FileState]) -> None:
    """Compare files with their states.

    Another size or time of change is refused, although the content may be that of before again. Another inode alone,
    which some network file systems invent, has the content compared.

    Raises:
        SourceChangedError: a file has changed or is gone.
    """
    for state in states:
        try:
            status = state.path.stat()
            change = _describe_change(state, status.st_size, status.st_mtime_ns)
            may_differ = (status.st_ino, status.st_ctime_ns) != (state.inode, state.ctime_ns) or state.is_recent
            if change is None and may_differ and sha256_of_file(state.path) != state.sha256:
                change = "its content is another one"
        except OSError as error:
            change = str(error.strerror)
        if change:
            raise SourceChangedError(
                f"{shorten(state.path)}: changed while it was prepared: {change}; run the same command again"
            )


def digest_states(states: Sequence[FileState]) -> str:
    """Return a digest of sizes and times, by which an interrupted preparation knows that no file was written since."""
    return hashlib.sha256(json.dumps([(state.size, state.mtime_ns) for state in states]).encode()).hexdigest()


def _describe_change(state: FileState, size: int, mtime_ns: int) -> str | None:
    if size != state.size:
        return f"{state.size:,} bytes became {size:,}"
    return "it was written again" if mtime_ns != state.mtime_ns else None
