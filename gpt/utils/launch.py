"""What the launcher (torchrun) says of this process, in environment variables; and its end. Without importing torch."""

import atexit
import contextlib
import os
import sys
from typing import NoReturn

from gpt.errors import UserError


def rank() -> int:
    """This process's number among all."""
    return int(os.environ.get("RANK", "0"))


def local_rank() -> int:
    """This process's number on its machine."""
    return int(os.environ.get("LOCAL_RANK", "0"))


def world_size() -> int:
    """Processes that train together."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def local_world_size() -> int:
    """Those of them on this machine."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", "1"))


def restarts() -> int:
    """How often the launcher has started all processes again."""
    return int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"))


def keeps_store() -> bool:
    """Whether the launcher itself holds what the processes tell each other at the start, over their restarts."""
    return os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"


def store_address() -> tuple[str, int]:
    """Host and port of that store.

    Raises:
        UserError: the launcher did not say.
    """
    try:
        return os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    except (KeyError, ValueError) as error:
        raise UserError(
            f"WORLD_SIZE is {world_size()} but MASTER_ADDR and MASTER_PORT do not say where the processes meet; "
            "start them with torchrun"
        ) from error


def end_process(status: int = 0) -> NoReturn:
    """End this process at once, after what is registered to be done at its end.

    Python would take half a second to take torch apart. Under torchrun it may even abort what has gone well: gloo's
    threads outlive their groups, and one that gives up a tensor while the interpreter ends brings the process down. A
    process that has failed would wait for the threads of collectives that nobody joins any more, for as long as a step
    may take.
    """
    if not (status and world_size() > 1):
        if sys.getprofile() or sys.gettrace():
            sys.exit(status)  # a profiler or a debugger is to have its say
        atexit._run_exitfuncs()
    for stream in filter(None, (sys.stdout, sys.stderr)):  # closed ones are None
        with contextlib.suppress(OSError):
            stream.flush()
    os._exit(status)
