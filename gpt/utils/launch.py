"""Facts that the launcher (torchrun) gives this process in environment variables, and the process's end; no torch.

A variable that is set to an empty text counts as unset.
"""

import atexit
import contextlib
import os
import shutil
import sys
from typing import NoReturn

from gpt.configs.user_folders import temporary_folder
from gpt.errors import UserError

MAX_MONITORING_TOOLS = 6
"""Number of tool ids of `sys.monitoring` (PEP 669)."""
DUMB_TERMS = frozenset({"dumb", "unknown"})
"""Values of TERM for terminals that cannot move the cursor."""
MIN_COLUMNS = 20
"""Least width that text is formatted for, in characters."""


def rank() -> int:
    """Return this process's rank among all.

    Raises:
        UserError: RANK is no rank of WORLD_SIZE ranks.
    """
    number, size = _read_number("RANK", 0), world_size()
    if number >= size:
        size_text = f"is {size}" if _read("WORLD_SIZE") else "is not set"
        raise UserError(f"RANK is {number}, but WORLD_SIZE {size_text}; unset RANK, or start the ranks with torchrun")
    return number


def local_rank() -> int:
    """Return this process's rank on its machine.

    Raises:
        UserError: LOCAL_RANK is no rank of LOCAL_WORLD_SIZE ranks.
    """
    number = _read_number("LOCAL_RANK", 0)
    name = "LOCAL_WORLD_SIZE" if _read("LOCAL_WORLD_SIZE") else "WORLD_SIZE"
    size = _read_number(name, 1, minimum=1)
    if number >= size:
        size_text = f"is {size}" if _read(name) else "is not set"
        raise UserError(
            f"LOCAL_RANK is {number}, but {name} {size_text}; unset LOCAL_RANK, or start the ranks with torchrun"
        )
    return number


def world_size() -> int:
    """Return the number of ranks.

    Raises:
        UserError: WORLD_SIZE is no count.
    """
    return _read_number("WORLD_SIZE", 1, minimum=1)


def local_world_size() -> int:
    """Return the number of ranks on this machine.

    Raises:
        UserError: LOCAL_WORLD_SIZE is no count, or more than WORLD_SIZE.
    """
    number, size = _read_number("LOCAL_WORLD_SIZE", 1, minimum=1), world_size()
    if number > size:
        raise UserError(
            f"LOCAL_WORLD_SIZE is {number}, more than WORLD_SIZE, which is {size}; start the ranks with torchrun"
        )
    return number


def restarts() -> int:
    """Return how often the launcher has restarted all processes."""
    return _read_number("TORCHELASTIC_RESTART_COUNT", 0)


def speaks_first() -> bool:
    """Return whether this process reports at once: it is rank 0, or its environment names no valid rank."""
    try:
        return rank() == 0
    except UserError:
        return True


def has_peers() -> bool:
    """Return whether the environment names more ranks than this one; False if it is not valid."""
    try:
        return world_size() > 1
    except UserError:
        return False


def provide_home() -> None:
    """Set HOME to a folder for temporary files if this process has no home folder.

    A user id without an entry in the password database has none, unless HOME names it. Libraries then make a folder
    named `~` in the current one.
    """
    if not _read("HOME"):
        os.environ.pop("HOME", None)  # an empty HOME would hide the entry in the password database
    if not os.path.isabs(os.path.expanduser("~")):  # noqa: PTH111, PTH117 - Path.expanduser raises
        os.environ["HOME"] = str(temporary_folder())


def widen_terminal() -> None:
    """Set COLUMNS to MIN_COLUMNS if the terminal is narrower, where the help screen would never end."""
    if shutil.get_terminal_size().columns < MIN_COLUMNS:
        os.environ["COLUMNS"] = str(MIN_COLUMNS)


def has_dumb_terminal() -> bool:
    """Return whether TERM names a terminal that cannot move its cursor."""
    return os.environ.get("TERM", "").lower() in DUMB_TERMS


def keeps_store() -> bool:
    """Return whether the launcher holds the store where the ranks meet, so that it outlives their restarts."""
    return os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"


def store_address() -> tuple[str, int]:
    """Return host and port of the store where the ranks meet.

    Raises:
        UserError: the launcher did not set them.
    """
    host, port = _read("MASTER_ADDR"), _read("MASTER_PORT")
    if not (host and port.isascii() and port.isdecimal() and 0 < int(port) < 2**16):
        raise UserError(
            f"WORLD_SIZE is {world_size()}, but MASTER_ADDR is {host or 'not set'} and MASTER_PORT is "
            f"{port or 'not set'}; start the ranks with torchrun"
        )
    if not _read("RANK"):
        raise UserError(f"WORLD_SIZE is {world_size()}, but RANK is not set; start the ranks with torchrun")
    return host, int(port)


def quiet_native_logs() -> None:
    """Let torch's C++ code log errors only, unless the user set its level; call it before torch is imported.

    Its warnings about lost connections are dozens of stack frames each, on every rank.
    """
    if has_peers():
        os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")


def choose_gloo_interface(name: str) -> str:
    """Let gloo use a network interface, unless the user has chosen one; return the one that it uses.

    Args:
        name: the interface; empty leaves the choice to gloo.
    """
    if name and not _read("GLOO_SOCKET_IFNAME"):
        os.environ["GLOO_SOCKET_IFNAME"] = name
    return _read("GLOO_SOCKET_IFNAME")


def record_collectives(prefix: str) -> str:
    """Let NCCL's flight recorder keep the last collectives and write them when one times out; keep the user's settings.

    Args:
        prefix: path of the files; torch appends the rank.

    Returns:
        The prefix in use: the user may have set another.
    """
    for name, value in (
        ("TORCH_FR_BUFFER_SIZE", "2000"),
        ("TORCH_FR_DUMP_TEMP_FILE", prefix),
        ("TORCH_NCCL_DEBUG_INFO_TEMP_FILE", prefix),  # its name in earlier versions of torch
        ("TORCH_NCCL_DUMP_ON_TIMEOUT", "1"),
    ):
        os.environ.setdefault(name, value)
    return os.environ["TORCH_FR_DUMP_TEMP_FILE"]


def end_process(status: int = 0) -> NoReturn:
    """End this process at once, after its `atexit` functions.

    Python needs half a second to unload torch. Under torchrun it may even abort after a success: gloo's threads
    outlive their groups, and one that frees a tensor during the interpreter's shutdown crashes the process. A rank
    that fails skips its `atexit` functions, which would wait for collectives that no other rank joins, for up to the
    step timeout.
    """
    if not (status and has_peers()):
        if _is_observed():
            sys.exit(status)  # a profiler or debugger prints its results at a normal exit
        atexit._run_exitfuncs()
    for stream in filter(None, (sys.stdout, sys.stderr)):  # a closed stream is None
        with contextlib.suppress(OSError):
            stream.flush()
    os._exit(status)


def _is_observed() -> bool:
    """Return whether a profiler, debugger or coverage tool watches this process."""
    if sys.getprofile() or sys.gettrace():
        return True
    monitoring = getattr(sys, "monitoring", None)  # Python 3.12; cProfile uses it and leaves sys.getprofile empty
    return monitoring is not None and any(monitoring.get_tool(tool) for tool in range(MAX_MONITORING_TOOLS))


def _read(name: str) -> str:
    return os.environ.get(name, "").strip()


def _read_number(name: str, default: int, *, minimum: int = 0) -> int:
    text = _read(name)
    if not text:
        return default
    try:
        number = int(text)
    except ValueError:
        number = minimum - 1
    if number < minimum:
        raise UserError(
            f"{name} is {text!r}, not a whole number of at least {minimum}; unset it, or start the ranks with torchrun"
        )
    return number
