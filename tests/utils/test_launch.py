import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from gpt.errors import UserError
from gpt.utils import launch

VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


@pytest.fixture
def set_variables(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Return a function that sets the launcher's variables and unsets all others of them."""

    def set_them(**values: str) -> None:
        for name in VARIABLES:
            monkeypatch.delenv(name, raising=False)
        for name, value in values.items():
            monkeypatch.setenv(name, value)

    return set_them


CODE = """
import atexit, sys, threading, time
from gpt.utils.launch import end_process

atexit.register(print, "cleaned up")
threading.Thread(target=time.sleep, args=(600,)).start()
print("said", end=" ")
end_process(int(sys.argv[1]))
"""


@pytest.mark.parametrize(
    ("status", "processes", "said"),
    [(0, 1, "said cleaned up\n"), (2, 1, "said cleaned up\n"), (0, 2, "said cleaned up\n"), (2, 2, "said ")],
)
def test_end_process_does_not_wait_for_threads(status: int, processes: int, said: str) -> None:
    environment = os.environ | {"WORLD_SIZE": str(processes)}
    command = [sys.executable, "-c", CODE, str(status)]
    done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, timeout=60)
    assert (done.returncode, done.stdout) == (status, said)


def test_end_process_lets_a_profiler_report() -> None:
    code = "import cProfile; cProfile.run('from gpt.utils.launch import end_process; end_process(3)')"
    done = subprocess.run([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, timeout=60)
    assert "function calls" in done.stdout


def test_end_process_lets_a_tool_of_sys_monitoring_report() -> None:
    code = """
import atexit, sys, types
sys.monitoring = types.SimpleNamespace(get_tool=lambda tool: "coverage" if tool == 1 else None)
from gpt.utils.launch import end_process
try:
    end_process(3)
finally:
    print("the tool reports")
"""
    done = subprocess.run([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, timeout=60)
    assert (done.returncode, done.stdout) == (3, "the tool reports\n")


def test_empty_variables_count_as_unset(set_variables: Callable[..., None]) -> None:
    set_variables(**dict.fromkeys(VARIABLES, ""), TORCHELASTIC_RESTART_COUNT=" ")
    assert (launch.rank(), launch.world_size(), launch.local_rank(), launch.local_world_size()) == (0, 1, 0, 1)
    assert launch.restarts() == 0
    assert launch.speaks_first()


@pytest.mark.parametrize(
    ("variables", "read", "message"),
    [
        ({"RANK": "abc"}, launch.rank, "RANK is 'abc', not a whole number of at least 0; unset it, or start the "),
        ({"RANK": "-1"}, launch.rank, "RANK is '-1', not a whole number of at least 0"),
        ({"RANK": "1.0"}, launch.rank, "RANK is '1.0', not a whole number"),
        ({"RANK": "1"}, launch.rank, "RANK is 1, but WORLD_SIZE is not set; unset RANK, or start the ranks with torch"),
        ({"RANK": "2", "WORLD_SIZE": "2"}, launch.rank, "RANK is 2, but WORLD_SIZE is 2"),
        ({"WORLD_SIZE": "0"}, launch.world_size, "WORLD_SIZE is '0', not a whole number of at least 1"),
        ({"WORLD_SIZE": "two"}, launch.rank, "WORLD_SIZE is 'two', not a whole number of at least 1"),
        ({"LOCAL_RANK": "abc"}, launch.local_rank, "LOCAL_RANK is 'abc', not a whole number of at least 0"),
        ({"LOCAL_RANK": "1"}, launch.local_rank, "LOCAL_RANK is 1, but WORLD_SIZE is not set"),
        ({"LOCAL_RANK": "4", "LOCAL_WORLD_SIZE": "4"}, launch.local_rank, "LOCAL_RANK is 4, but LOCAL_WORLD_SIZE is 4"),
        ({"LOCAL_WORLD_SIZE": "4", "WORLD_SIZE": "2"}, launch.local_world_size, "LOCAL_WORLD_SIZE is 4, more than WOR"),
        ({"WORLD_SIZE": "2", "MASTER_ADDR": "h", "MASTER_PORT": "x"}, launch.store_address, "and MASTER_PORT is x"),
        ({"WORLD_SIZE": "2", "MASTER_ADDR": "h", "MASTER_PORT": "1"}, launch.store_address, "but RANK is not set"),
    ],
)
def test_contradictory_variables_are_named(
    variables: dict[str, str], read: Callable[[], object], message: str, set_variables: Callable[..., None]
) -> None:
    set_variables(**variables)
    with pytest.raises(UserError, match=message):
        read()
    launch.speaks_first()  # never fails, because errors are reported by it
    launch.has_peers()


def test_rank_without_a_local_world_size_may_be_any_of_the_world(set_variables: Callable[..., None]) -> None:
    set_variables(RANK="3", WORLD_SIZE="4", LOCAL_RANK="3")
    assert (launch.rank(), launch.local_rank()) == (3, 3)
    assert not launch.speaks_first()


@pytest.mark.parametrize("home", ["~", None])
def test_missing_home_becomes_a_folder_for_temporary_files(
    home: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(launch, "temporary_folder", lambda: tmp_path / "mine")
    monkeypatch.setenv("HOME", "")
    if home is not None:  # as os.path.expanduser leaves it for a user id that has no entry
        monkeypatch.setattr(launch.os.path, "expanduser", lambda path: path)
    launch.provide_home()
    assert os.environ.get("HOME") == (str(tmp_path / "mine") if home else None)


def test_home_that_is_set_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    launch.provide_home()
    assert os.environ["HOME"] == str(tmp_path)


@pytest.mark.parametrize(("columns", "expected"), [("1", "20"), ("4", "20"), ("20", "20"), ("100", "100"), ("x", "x")])
def test_text_is_formatted_for_a_least_width(columns: str, expected: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Spare tyro widths of 4 and less, at which it never ends."""
    monkeypatch.setenv("COLUMNS", columns)
    launch.widen_terminal()
    assert os.environ["COLUMNS"] == expected


@pytest.mark.parametrize(
    ("size", "level", "expected"), [("2", None, "ERROR"), ("2", "INFO", "INFO"), ("1", None, None)]
)
def test_native_warnings_are_off_with_several_ranks(
    size: str, level: str | None, expected: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WORLD_SIZE", size)
    monkeypatch.setenv("TORCH_CPP_LOG_LEVEL", level or "")  # so that it is restored
    if level is None:
        monkeypatch.delenv("TORCH_CPP_LOG_LEVEL")
    launch.quiet_native_logs()
    assert os.environ.get("TORCH_CPP_LOG_LEVEL") == expected


def test_gloo_uses_the_interface_that_the_user_chose(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "")
    assert launch.choose_gloo_interface("") == ""
    assert launch.choose_gloo_interface("eth0") == "eth0" == os.environ["GLOO_SOCKET_IFNAME"]
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "ib0")
    assert launch.choose_gloo_interface("eth0") == "ib0"
