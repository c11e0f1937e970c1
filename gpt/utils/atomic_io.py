"""Files that are either whole or absent, whatever happens while they are written."""

import json
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from gpt.errors import UserError


def write_text(path: Path, text: str) -> None:
    """Replace `path` by `text` in one step: temporary file, fsync, rename."""
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.write_text(text, encoding="utf-8")
    fsync(temporary)
    temporary.replace(path)
    fsync(path.parent)


def write_json(path: Path, value: Any) -> None:
    """Replace `path` by `value` as JSON in one step."""
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


@contextmanager
def new_folder(path: Path) -> Iterator[Path]:
    """A temporary folder that becomes `path` when the block ends, and is removed when it raises.

    Every file is on the disk before the rename, so a folder of this name is always complete.
    """
    temporary = path.with_name(f".{path.name}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    try:
        yield temporary
        for file in temporary.iterdir():
            fsync(file)
        fsync(temporary)
        temporary.rename(path)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    fsync(path.parent)


def remove_folder(path: Path) -> None:
    """Remove a folder so that it is never seen half there: rename first, then delete."""
    doomed = path.with_name(f".{path.name}.gone")
    shutil.rmtree(doomed, ignore_errors=True)
    path.rename(doomed)
    fsync(path.parent)
    shutil.rmtree(doomed)


def append_jsonl(path: Path, record: dict[str, Any]) -> None:
    """Add one line of JSON."""
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(record, ensure_ascii=False) + "\n")


def keep_jsonl(path: Path, wanted: Callable[[dict[str, Any]], bool]) -> None:
    """Rewrite a JSONL file with the wanted records alone; a torn last line goes too."""
    if not path.exists():
        return
    kept = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            record = json.loads(line)
        except ValueError:
            continue
        if wanted(record):
            kept.append(line + "\n")
    write_text(path, "".join(kept))


def require_writable(folder: Path, flag: str) -> None:
    """Make `folder` and try to write in it.

    Raises:
        UserError: it cannot be made or written to.
    """
    probe = folder / ".writable"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise UserError(f"{flag} {folder}: cannot write there: {error.strerror}; name another folder") from error


def fsync(path: Path) -> None:
    """Force a file or a folder to the disk."""
    if os.name == "nt" and path.is_dir():
        return  # Windows opens no folder; NTFS journals the rename itself
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
