"""One run per folder: a lock that the kernel takes back however its holder ends, so that none is ever stale."""

import errno
import json
import logging
import os
import socket
import sys
from pathlib import Path

from gpt.errors import UserError

if sys.platform != "win32":
    import fcntl

log = logging.getLogger(__name__)

LOCK = ".lock"
"""The file that is locked; it holds who does so, and stays when the lock is gone."""

_held: dict[Path, tuple[int, int]] = {}
"""Folder -> process and descriptor of its lock. A lock is the process's: what asks again there has it already."""


def lock_folder(folder: Path, flag: str) -> None:
    """Take the lock of an existing folder until `unlock_folder` or the end of the process.

    The descriptor is closed on exec, so no program that this one starts can keep the lock.

    Raises:
        UserError: another process has it, or the file cannot be made.
    """
    if _is_held(folder):
        return
    path = folder / LOCK
    try:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | getattr(os, "O_NOFOLLOW", 0), 0o644)
    except OSError as error:
        raise UserError(f"{flag} {folder}: cannot make {path}: {error.strerror}; name another folder") from error
    try:
        _lock(descriptor, folder, flag)
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, json.dumps({"host": socket.gethostname(), "pid": os.getpid()}).encode(), 0)
    except BaseException as error:
        os.close(descriptor)
        if not isinstance(error, OSError):
            raise
        raise UserError(f"{flag} {folder}: cannot write {path}: {error.strerror}; name another folder") from error
    unlock_folder(folder)  # of a folder that was deleted meanwhile
    _held[folder.resolve()] = (os.getpid(), descriptor)


def unlock_folder(folder: Path) -> None:
    """Give the lock back; where this process has none, nothing happens."""
    process, descriptor = _held.pop(folder.resolve(), (0, -1))
    if process:
        os.close(descriptor)


def _is_held(folder: Path) -> bool:
    """Whether this very process has the lock of the file that lies there now: not a parent, not of a deleted folder."""
    process, descriptor = _held.get(folder.resolve(), (0, -1))
    try:
        return process == os.getpid() and os.path.samestat(os.fstat(descriptor), (folder / LOCK).stat())
    except OSError:
        return False


def _lock(descriptor: int, folder: Path, flag: str) -> None:
    if sys.platform == "win32":
        return
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        raise UserError(
            f"{flag} {folder} is in use by {_holder(descriptor)}; wait for its end, or name another {flag}"
        ) from error
    except OSError as error:
        if error.errno not in (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP):
            raise
        log.warning(f"{folder}: this file system has no locks ({error.strerror}); see that one run alone uses it")


def _holder(descriptor: int) -> str:
    """Who wrote into the locked file; it is empty for the moment between its lock and its text."""
    try:
        holder = json.loads(os.pread(descriptor, 4096, 0))
        return f"process {int(holder['pid'])} on {holder['host']}"
    except (ValueError, KeyError, TypeError):
        return "another process"
