"""Facts that the launcher (torchrun) gives this process in environment variables, and the process's end; no torch."""

import atexit
import contextlib
import os
import sys
from typing import NoReturn

from gpt.errors import UserError


def rank() -> int:
    """Return this process's rank among all."""
    return int(os.environ.get("RANK", "0"))


def local_rank() -> int:
    """Return this process's rank on its machine."""
    return int(os.environ.get("LOCAL_RANK", "0"))


def world_size() -> int:
    """Return the number of ranks."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def local_world_size() -> int:
    """Return the number of ranks on this machine."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", "1"))


def restarts() -> int:
    """Return how often the launcher has restarted all processes."""
    return int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"))


def keeps_store() -> bool:
    """Return whether the launcher holds the store where the ranks meet, so that it outlives their restarts."""
    return os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"


def store_address() -> tuple[str, int]:
    """Return host and port of the store where the ranks meet.

    Raises:
        UserError: the launcher did not set them.
    """
    try:
        return os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    except (KeyError, ValueError) as error:
        raise UserError(
            f"WORLD_SIZE is {world_size()}, but MASTER_ADDR and MASTER_PORT are not set; start the ranks with torchrun"
        ) from error


def end_process(status: int = 0) -> NoReturn:
    """End this process at once, after its `atexit` functions.

    Python needs half a second to unload torch. Under torchrun it may even abort after a success: gloo's threads
    outlive their groups, and one that frees a tensor during the interpreter's shutdown crashes the process. A rank
    that fails skips its `atexit` functions, which would wait for collectives that no other rank joins, for up to the
    step timeout.
    """
    if not (status and world_size() > 1):
        if sys.getprofile() or sys.gettrace():
            sys.exit(status)  # a profiler or debugger prints its results at a normal exit
        atexit._run_exitfuncs()
    for stream in filter(None, (sys.stdout, sys.stderr)):  # a closed stream is None
        with contextlib.suppress(OSError):
            stream.flush()
    os._exit(status)
