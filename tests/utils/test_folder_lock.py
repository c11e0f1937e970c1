"""The lock with real processes; its use by runs is in tests/faults/test_run_folder.py."""

import errno
import json
import logging
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from gpt.errors import UserError
from gpt.utils import folder_lock
from gpt.utils.folder_lock import LOCK, hold_lock, lock_folder, unlock_folder

HOLD = """
import subprocess, sys
from pathlib import Path
from gpt.utils.folder_lock import lock_folder
lock_folder(Path(sys.argv[1]), "--run-dir")
child = subprocess.Popen(["sleep", "60"], close_fds=False)
print(child.pid, flush=True)
sys.stdin.read()
"""


@contextmanager
def holder(folder: Path) -> Iterator[tuple[subprocess.Popen[str], int]]:
    """Start a process that holds the lock, and a child of it; the process may have ended when the block ends."""
    process = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(folder)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    child = int(process.stdout.readline())
    try:
        yield process, child
    finally:
        os.kill(child, 9)
        process.kill()
        process.communicate()


def test_a_locked_folder_is_refused_and_its_holder_named(tmp_path: Path) -> None:
    with holder(tmp_path) as (process, _):
        with pytest.raises(UserError) as error:
            lock_folder(tmp_path, "--run-dir")
        assert str(error.value) == (
            f"--run-dir {tmp_path} is in use by process {process.pid} on {socket.gethostname()}; wait for its "
            "end, or use another --run-dir"
        )
        assert json.loads((tmp_path / LOCK).read_text()) == {"host": socket.gethostname(), "pid": process.pid}


def test_a_killed_holder_releases_the_lock_though_its_children_live(tmp_path: Path) -> None:
    with holder(tmp_path) as (process, child):
        process.kill()
        process.wait()
        os.kill(child, 0)
        lock_folder(tmp_path, "--run-dir")
        assert json.loads((tmp_path / LOCK).read_text())["pid"] == os.getpid()
    unlock_folder(tmp_path)


def test_a_process_may_lock_twice_and_unlocks_once(tmp_path: Path) -> None:
    lock_folder(tmp_path, "--run-dir")
    lock_folder(tmp_path / ".." / tmp_path.name, "--run-dir")
    assert json.loads((tmp_path / LOCK).read_text())["pid"] == os.getpid()
    code = (
        "import sys; from pathlib import Path; from gpt.utils.folder_lock import lock_folder; "
        "lock_folder(Path(sys.argv[1]), '--run-dir')"
    )
    attempt = [sys.executable, "-c", code, str(tmp_path)]
    assert subprocess.run(attempt, capture_output=True).returncode == 1
    unlock_folder(tmp_path)
    unlock_folder(tmp_path)
    assert subprocess.run(attempt).returncode == 0


def test_a_fork_of_the_holder_is_another_process(tmp_path: Path) -> None:
    code = f"""
import os
from pathlib import Path
from gpt.errors import UserError
from gpt.utils.folder_lock import lock_folder
lock_folder(Path({str(tmp_path)!r}), "--run-dir")
pid = os.getpid()
if os.fork():
    os.wait()
else:
    try:
        lock_folder(Path({str(tmp_path)!r}), "--run-dir")
    except UserError as error:
        print(f"process {{pid}} on" in str(error))
"""
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout == "True\n"


def test_a_recreated_folder_is_locked_again(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    for _ in range(2):
        folder.mkdir()
        lock_folder(folder, "--run-dir")
        assert json.loads((folder / LOCK).read_text())["pid"] == os.getpid()
        (folder / LOCK).unlink()
        folder.rmdir()
    unlock_folder(folder)


def test_a_lock_file_that_is_a_link_is_refused(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "precious").write_text("x")
    (tmp_path / "run" / LOCK).symlink_to(tmp_path / "precious")
    with pytest.raises(UserError, match=r"cannot make .*symbolic link"):
        lock_folder(tmp_path / "run", "--run-dir")
    assert (tmp_path / "precious").read_text() == "x"


WAIT = """
import sys, time
from pathlib import Path
from gpt.utils.folder_lock import hold_lock
path = Path(sys.argv[1])
print("started", flush=True)
with hold_lock(path):
    order = path.with_suffix(".order")
    with order.open("a") as file:
        file.write("in ")
        file.flush()
        time.sleep(0.2)
        file.write("out ")
"""


def start_waiter(path: Path) -> subprocess.Popen[str]:
    """Start a process that waits for the lock file `path` or holds it."""
    process = subprocess.Popen([sys.executable, "-c", WAIT, str(path)], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "started\n"
    return process


def test_waiting_processes_hold_a_lock_one_after_the_other(tmp_path: Path) -> None:
    path = tmp_path / "a.lock"
    waiters = [start_waiter(path) for _ in range(4)]
    assert [waiter.wait(30) for waiter in waiters] == [0] * 4
    for waiter in waiters:
        waiter.communicate()
    assert (tmp_path / "a.order").read_text() == "in out " * 4
    assert not path.exists()


def test_a_waiting_process_names_the_holder_and_goes_on_when_it_is_killed(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with holder(tmp_path) as (process, _):
        threading.Timer(0.5, process.kill).start()
        with caplog.at_level(logging.INFO), hold_lock(tmp_path / LOCK):
            assert process.wait(5) == -signal.SIGKILL
            assert json.loads((tmp_path / LOCK).read_text())["pid"] == os.getpid()
    assert caplog.messages == [
        f"waiting for process {process.pid} on {socket.gethostname()}, which holds {tmp_path / LOCK}"
    ]


def test_ctrl_c_ends_a_process_that_waits(tmp_path: Path) -> None:
    path = tmp_path / "a.lock"
    with hold_lock(path):
        waiter = start_waiter(path)
        time.sleep(0.3)
        assert waiter.poll() is None
        waiter.send_signal(signal.SIGINT)
        assert waiter.wait(5) not in (0, None)
        waiter.communicate()
        assert path.exists()
    assert not (tmp_path / "a.order").exists()


def test_threads_of_a_process_wait_for_each_other(tmp_path: Path) -> None:
    order = []

    def work() -> None:
        with hold_lock(tmp_path / "a.lock"):
            order.append("in")
            time.sleep(0.05)
            order.append("out")

    threads = [threading.Thread(target=work) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert order == ["in", "out"] * 3


@pytest.mark.parametrize(
    "code",
    [
        errno.ENOLCK,
        errno.ENOSYS,
        errno.EOPNOTSUPP,
        524,
        errno.EINVAL,
        errno.ENOTTY,
        errno.EPERM,
        errno.EACCES,
        errno.EBADF,
    ],
)
def test_a_file_system_without_locks_is_warned_about_once_and_used(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, code: int
) -> None:
    def refuse(*_: object) -> None:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(folder_lock.fcntl, "flock", refuse)
    lock_folder(tmp_path, "--run-dir")
    unlock_folder(tmp_path)
    with hold_lock(tmp_path / "a.lock"):
        pass
    assert [message.partition(": ")[::2] for message in caplog.messages] == [
        (str(path), f"this file system has no locks ({os.strerror(code)}); make sure that only one process uses it")
        for path in (tmp_path / LOCK, tmp_path / "a.lock")
    ]


def test_other_errors_of_a_lock_are_raised(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(folder_lock.fcntl, "flock", refuse)
    with pytest.raises(UserError, match=r"cannot write .*: Input/output error; use another folder"):
        lock_folder(tmp_path, "--run-dir")
    with pytest.raises(OSError, match="Input/output error") as error, hold_lock(tmp_path / "a.lock"):
        pass
    assert error.value.filename == str(tmp_path / "a.lock")


def test_lock_file_of_another_user_is_locked_without_writing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Refuse to open it for writing, as the kernel does for anyone but root."""
    path = tmp_path / LOCK
    path.write_text("of another user")
    system_open = os.open

    def open_for_reading_only(name: Path, flags: int, mode: int = 0o777) -> int:
        if flags & (os.O_RDWR | os.O_CREAT):
            raise PermissionError(errno.EACCES, "Permission denied", str(name))
        return system_open(name, flags, mode)

    monkeypatch.setattr(folder_lock.os, "open", open_for_reading_only)
    lock_folder(tmp_path, "--run-dir")
    with system_open_descriptor(path) as descriptor, pytest.raises(BlockingIOError):
        folder_lock.fcntl.flock(descriptor, folder_lock.fcntl.LOCK_EX | folder_lock.fcntl.LOCK_NB)
    unlock_folder(tmp_path)
    assert path.read_text() == "of another user"


@contextmanager
def system_open_descriptor(path: Path) -> Iterator[int]:
    with path.open() as file:
        yield file.fileno()


def test_lock_file_that_cannot_even_be_read_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(name: Path, *_: object) -> int:
        raise PermissionError(errno.EACCES, "Permission denied", str(name))

    monkeypatch.setattr(folder_lock.os, "open", refuse)
    with pytest.raises(
        UserError, match=rf"--run-dir {tmp_path}: cannot make {tmp_path / LOCK}: Permission denied; use"
    ):
        lock_folder(tmp_path, "--run-dir")
    with pytest.raises(PermissionError) as error, hold_lock(tmp_path / "a.lock"):
        pass
    assert str(error.value.filename) == str(tmp_path / "a.lock")


WINDOWS = """
import errno, fcntl, os, sys, types
from pathlib import Path

def locking(descriptor, mode, size):
    assert os.lseek(descriptor, 0, os.SEEK_CUR) == 2**30 and size == 1 and mode == 2
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise PermissionError(errno.EACCES, "Permission denied") from None

sys.modules["msvcrt"] = types.SimpleNamespace(locking=locking, LK_NBLCK=2)
for name in ("pwrite", "pread", "O_NOFOLLOW", "fchmod", "getuid", "sched_getaffinity", "sysconf"):
    delattr(os, name)
sys.platform = "win32"
from gpt.errors import UserError
from gpt.utils.folder_lock import hold_lock, lock_folder

folder = Path(sys.argv[1])
try:
    lock_folder(folder, "--run-dir")
    with hold_lock(folder / "a.lock"):
        print("locked")
except UserError as error:
    print(error)
"""


def test_locks_need_nothing_that_windows_lacks(tmp_path: Path) -> None:
    command = [sys.executable, "-c", WINDOWS, str(tmp_path)]
    assert subprocess.run(command, capture_output=True, text=True).stdout == "locked\n"
    with holder(tmp_path) as (process, _):
        done = subprocess.run(command, capture_output=True, text=True)
        assert f"is in use by process {process.pid} on " in done.stdout, done.stderr
