"""Files and folders that are complete or absent, whatever happens while they are written."""

import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from gpt.errors import UserError

UNFINISHED_SUFFIX, REMOVED_SUFFIX = ".tmp", ".gone"
"""Suffixes of folders that are being written or removed; their names begin with a dot."""


def write_text(path: Path, text: str) -> None:
    """Replace `path` by `text` in one step: temporary file, fsync, rename."""
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.write_text(text, encoding="utf-8", newline="\n")
    fsync(temporary)
    temporary.replace(path)
    fsync(path.parent)


def write_json(path: Path, value: Any) -> None:
    """Replace `path` by `value` as JSON in one step."""
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def read_json(path: Path) -> dict[str, Any]:
    """Return the JSON object in a file.

    Raises:
        UserError: the file cannot be read, or holds no JSON object.
    """
    try:
        return parse_json_object(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}") from error
    except ValueError as error:
        raise UserError(f"{path}: {error}") from error


def parse_json_object(text: str) -> dict[str, Any]:
    """Return the JSON object that a text holds.

    Raises:
        ValueError: it holds none.
    """
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"not valid JSON: {error}") from error
    if not isinstance(value, dict):
        raise ValueError("not a JSON object")
    return value


def make_folder(path: Path) -> None:
    """Make `path` and the missing folders above it, each on the disk before the next is made in it."""
    if not path.exists():
        make_folder(path.parent)
        path.mkdir(exist_ok=True)  # another run may have made it meanwhile
        fsync(path.parent)


@contextmanager
def commit_folder(path: Path) -> Iterator[Path]:
    """Yield a temporary folder that becomes `path` at the end of the block; it is removed if the block raises.

    All files are on the disk before the rename, so a folder of this name is always complete.
    """
    temporary = path.with_name(f".{path.name}{UNFINISHED_SUFFIX}")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir()
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
    """Remove a folder; it is renamed first, so that nobody finds half of it under its name."""
    stale = path.with_name(f".{path.name}{REMOVED_SUFFIX}")
    shutil.rmtree(stale, ignore_errors=True)
    path.rename(stale)
    fsync(path.parent)
    shutil.rmtree(stale)


def remove_leftovers(parent: Path) -> None:
    """Remove the leftovers of `commit_folder` and `remove_folder` in `parent` after a kill."""
    if parent.is_dir():
        for path in parent.iterdir():
            if is_leftover(path):
                shutil.rmtree(path, ignore_errors=True)


def is_leftover(path: Path) -> bool:
    """Return whether `commit_folder` or `remove_folder` is working on this folder, or was killed while it did."""
    return path.name.startswith(".") and path.name.endswith((UNFINISHED_SUFFIX, REMOVED_SUFFIX))


def append_jsonl(path: Path, record: dict[str, Any], *, durable: bool = False) -> None:
    """Append a record as one line of JSON.

    Args:
        path: the file, made if it does not exist.
        record: a JSON object.
        durable: whether to return only once the line and the file's name are on the disk.
    """
    with path.open("a", encoding="utf-8", newline="\n") as file:
        file.write(json.dumps(record, ensure_ascii=False) + "\n")
        if durable:
            file.flush()
            os.fsync(file.fileno())
    if durable:
        fsync(path.parent)


def read_jsonl(path: Path) -> Iterator[dict[str, Any]]:
    """Return the records of a JSONL file, without lines that hold no object, such as a torn last one.

    Without a file there are none.
    """
    return (record for _, record in _lines(path))


def filter_jsonl(path: Path, wanted: Callable[[dict[str, Any]], bool]) -> None:
    """Keep only the wanted records of a JSONL file, in one step; lines that hold no object are dropped as well."""
    if path.exists():
        write_text(path, "".join(line + "\n" for line, record in _lines(path) if wanted(record)))


def _lines(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    if not path.exists():
        return
    text = path.read_text(encoding="utf-8", errors="replace")
    for line in text.split("\n"):  # not splitlines: JSON may contain U+2028 unescaped
        try:
            record = parse_json_object(line)
        except ValueError:
            continue
        yield line, record


def truncate_jsonl(path: Path, step: int) -> None:
    """Drop the records of a JSONL file that have a later step or no step."""
    filter_jsonl(path, lambda record: isinstance(at := record.get("step"), int) and at <= step)


def require_writable(folder: Path, flag: str) -> None:
    """Make `folder` and write a temporary file in it.

    Raises:
        UserError: the folder cannot be made or written to.
    """
    try:
        make_folder(folder)
        tempfile.TemporaryFile(dir=folder).close()
    except OSError as error:
        raise UserError(f"{flag} {folder}: cannot write there: {error.strerror}; use another folder") from error


def require_creatable(folder: Path, flag: str) -> None:
    """Check, without writing, that `folder` is writable or could be made.

    Raises:
        UserError: the nearest existing path above it is not a writable folder.
    """
    nearest = next(path for path in (folder.absolute(), *folder.absolute().parents) if path.exists())
    if not (nearest.is_dir() and os.access(nearest, os.W_OK)):
        raise UserError(f"{flag} {folder}: cannot write there: {nearest} is not a writable folder; use another folder")


def fsync(path: Path) -> None:
    """Force a file or a folder to the disk.

    Raises:
        OSError: the disk refused; names the path.
    """
    if os.name == "nt" and path.is_dir():
        return  # Windows opens no folder; NTFS journals the rename itself
    # Windows flushes only what is open for writing.
    descriptor = os.open(path, os.O_RDWR if os.name == "nt" else os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(path)) from error
    finally:
        os.close(descriptor)
