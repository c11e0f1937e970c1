"""Locks between processes: one run per folder, one process that makes a file while others wait.

The kernel releases a lock when its holder ends, however it ends, so no lock is ever stale. The locked file names its
holder.
"""

import contextlib
import errno
import json
import logging
import os
import socket
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from gpt.errors import UserError

if sys.platform == "win32":
    import msvcrt
else:
    import fcntl

log = logging.getLogger(__name__)

LOCK = ".lock"
"""Name of the locked file in a folder; the file stays when the lock is released."""
POLL_SECONDS = 0.1
"""Seconds between two attempts to take a lock that another process holds."""

_ENOTSUPP = 524
"""An error number of the Linux kernel alone, which some network file systems let through."""
_NO_LOCKS = (
    *(errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, _ENOTSUPP, errno.EINVAL, errno.ENOTTY),
    *(errno.EPERM, errno.EACCES, errno.EBADF),  # EBADF: NFS locks no file that is open for reading only
)
"""Errors of file systems that have no locks, or do not let this user lock; on Unix none of them means a held lock."""
_WINDOWS_LOCK_OFFSET = 2**30
"""Windows lets nobody read locked bytes, so the locked one is far behind the holder's name."""

_held: dict[Path, tuple[int, int]] = {}
"""Folder -> process and descriptor of its lock. A lock belongs to its process, which may ask for it again."""


def lock_folder(folder: Path, flag: str) -> None:
    """Lock an existing folder until `unlock_folder` or the end of the process.

    The descriptor is closed on exec, so no program that this one starts keeps the lock.

    Args:
        folder: the folder.
        flag: the option that names it, for messages.

    Raises:
        UserError: another process holds the lock, or its file cannot be written.
    """
    if _is_held(folder):
        return
    path = folder / LOCK
    try:
        descriptor = _open_lock_file(path)
    except OSError as error:
        raise UserError(f"{flag} {folder}: cannot make {path}: {error.strerror}; use another folder") from error
    try:
        if not _try_lock(descriptor, path):
            holder = _read_holder(descriptor)
            raise UserError(f"{flag} {folder} is in use by {holder}; wait for its end, or use another {flag}")
        _write_holder(descriptor, path)
    except BaseException as error:
        os.close(descriptor)
        if not isinstance(error, OSError):
            raise
        raise UserError(f"{flag} {folder}: cannot write {path}: {error.strerror}; use another folder") from error
    unlock_folder(folder)  # a lock of a folder of this name that was deleted meanwhile
    _held[folder.resolve()] = (os.getpid(), descriptor)


def unlock_folder(folder: Path) -> None:
    """Release a folder's lock, if this process holds it."""
    process, descriptor = _held.pop(folder.resolve(), (0, -1))
    if process:
        os.close(descriptor)


@contextmanager
def hold_lock(path: Path) -> Iterator[None]:
    """Hold the lock file `path` within the block, after waiting for a process that holds it already.

    The file is removed at the end of the block.

    Raises:
        OSError: the file cannot be opened or locked; the error names it.
    """
    descriptor = _wait_for_lock(path)
    try:
        _write_holder(descriptor, path)
        yield
    finally:
        with contextlib.suppress(OSError):  # Windows removes no open file
            path.unlink()
        os.close(descriptor)


def _wait_for_lock(path: Path) -> int:
    """Return the descriptor of `path`, locked."""
    while True:
        descriptor = _open_lock_file(path)
        try:
            _poll_lock(descriptor, path)
        except BaseException:
            os.close(descriptor)
            raise
        if _is_at(path, descriptor):
            return descriptor
        os.close(descriptor)  # the former holder has removed the file, and others lock a new one


def _poll_lock(descriptor: int, path: Path) -> None:
    is_first = True
    while not _try_lock(descriptor, path):
        if is_first:
            log.info("waiting for %s, which holds %s", _read_holder(descriptor), path)
        is_first = False
        time.sleep(POLL_SECONDS)  # not a blocking lock, which Ctrl-C does not interrupt on every file system


def _is_held(folder: Path) -> bool:
    """Return whether this process, not its parent, holds the lock of the folder that is there now."""
    process, descriptor = _held.get(folder.resolve(), (0, -1))
    return process == os.getpid() and _is_at(folder / LOCK, descriptor)


def _is_at(path: Path, descriptor: int) -> bool:
    """Return whether `path` is the file that is open as `descriptor`."""
    try:
        return os.path.samestat(os.fstat(descriptor), path.stat())
    except OSError:
        return False


def _open_lock_file(path: Path) -> int:
    """Open the lock file, which another user may have left; a file that is open for reading can be locked, too."""
    flags = getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_BINARY", 0)
    try:
        return os.open(path, os.O_RDWR | os.O_CREAT | flags, 0o644)
    except PermissionError:
        with contextlib.suppress(OSError):
            return os.open(path, os.O_RDONLY | flags)
        raise


def _try_lock(descriptor: int, path: Path) -> bool:
    """Return False if another process holds the lock; where the file system has no locks, warn and return True."""
    try:
        if sys.platform == "win32":
            os.lseek(descriptor, _WINDOWS_LOCK_OFFSET, os.SEEK_SET)
            msvcrt.locking(descriptor, msvcrt.LK_NBLCK, 1)
        else:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as error:
        if sys.platform == "win32" and isinstance(error, PermissionError):
            return False  # Windows' error for a held lock
        if error.errno not in _NO_LOCKS:
            raise OSError(error.errno, error.strerror, str(path)) from error
        log.warning(
            f"{path}: this file system has no locks ({error.strerror}); make sure that only one process uses it"
        )
    return True


def _write_holder(descriptor: int, path: Path) -> None:
    """Write who holds the lock, for messages of others; not into a file of another user that is open for reading."""
    holder = json.dumps({"host": socket.gethostname(), "pid": os.getpid()}).encode()
    try:
        os.lseek(descriptor, 0, os.SEEK_SET)
        os.write(descriptor, holder)
        os.ftruncate(descriptor, len(holder))
    except OSError as error:
        if error.errno != errno.EBADF:
            raise OSError(error.errno, error.strerror, str(path)) from error


def _read_holder(descriptor: int) -> str:
    """Return who holds the lock, for messages; the file is empty for a moment after it is locked."""
    try:
        os.lseek(descriptor, 0, os.SEEK_SET)
        holder = json.loads(os.read(descriptor, 4096))
        return f"process {int(holder['pid'])} on {holder['host']}"
    except (ValueError, KeyError, TypeError):
        return "another process"
