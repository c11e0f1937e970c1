"""What the launcher (torchrun) says of this process, in environment variables; read without importing torch."""

import os

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
