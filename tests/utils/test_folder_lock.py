"""The lock with real processes; its use by runs is in tests/faults/test_run_folder.py."""

import json
import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from gpt.errors import UserError
from gpt.utils.folder_lock import LOCK, lock_folder, unlock_folder

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
    """A process that has the lock, and a program that it started; the holder may be gone when the block ends."""
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


def test_another_process_is_refused_and_told_whose_it_is(tmp_path: Path) -> None:
    with holder(tmp_path) as (process, _):
        with pytest.raises(UserError) as error:
            lock_folder(tmp_path, "--run-dir")
        assert str(error.value) == (
            f"--run-dir {tmp_path} is in use by process {process.pid} on {socket.gethostname()}; wait for its "
            "end, or name another --run-dir"
        )
        assert json.loads((tmp_path / LOCK).read_text()) == {"host": socket.gethostname(), "pid": process.pid}


def test_a_killed_holder_leaves_no_lock_though_its_children_live(tmp_path: Path) -> None:
    with holder(tmp_path) as (process, child):
        process.kill()
        process.wait()
        os.kill(child, 0)
        lock_folder(tmp_path, "--run-dir")
        assert json.loads((tmp_path / LOCK).read_text())["pid"] == os.getpid()
    unlock_folder(tmp_path)


def test_a_process_may_ask_again_and_gives_back_once(tmp_path: Path) -> None:
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


def test_a_folder_that_was_made_anew_is_locked_anew(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    for _ in range(2):
        folder.mkdir()
        lock_folder(folder, "--run-dir")
        assert json.loads((folder / LOCK).read_text())["pid"] == os.getpid()
        (folder / LOCK).unlink()
        folder.rmdir()
    unlock_folder(folder)


def test_a_link_is_not_followed_out_of_the_folder(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "precious").write_text("x")
    (tmp_path / "run" / LOCK).symlink_to(tmp_path / "precious")
    with pytest.raises(UserError, match=r"cannot make .*symbolic link"):
        lock_folder(tmp_path / "run", "--run-dir")
    assert (tmp_path / "precious").read_text() == "x"
