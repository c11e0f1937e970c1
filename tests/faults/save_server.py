"""One warm process that forks a child for every save, so that a fault can be injected into that save alone.

Python and torch take seconds to start, a fork takes milliseconds. The child does nothing before strace is attached to
it. Orders come as lines of JSON, answers go as lines of JSON; between them stands a line by which the save may begin.
"""

import json
import mmap
import os
import resource
import sys
from pathlib import Path
from typing import Any

import torch

from gpt.checkpoint.app_state import Progress
from gpt.checkpoint.manager import CheckpointManager
from gpt.checkpoint.run_folder import RunFolder
from gpt.checkpoint.store import verify_and_load
from gpt.configs.checkpoint_config import CheckpointConfig
from gpt.errors import UserError
from gpt.utils.atomic_io import sweep
from gpt.utils.distributed import DistContext
from tests.checkpoint.test_store import make_state, trained_state

torch.set_num_threads(1)
WIDTH = int(sys.argv[1]) if len(sys.argv) > 1 else 8
STATE, LOADED = trained_state(n_embd=WIDTH), make_state(9, WIDTH)
TOLD = mmap.mmap(-1, 2**16)
"""Where a child leaves its message without a system call, which might meet the fault."""


def save(order: dict[str, Any]) -> str | None:
    """Save a state that is made of the step's number; returns what went wrong."""
    if "largest_file" in order:
        resource.setrlimit(resource.RLIMIT_FSIZE, (order["largest_file"],) * 2)
    step = order["step"]
    config = CheckpointConfig(keep=order["keep"], asynchronous=order["asynchronous"])
    STATE.progress = Progress(step, step)
    STATE.model.get_parameter("wte.weight").data.fill_(step)
    try:
        manager = CheckpointManager(
            RunFolder(Path(order["run_dir"])), config, "{}", DistContext("cpu"), order["resumed_at"]
        )
        manager.save(STATE)
        manager.finish()
    except UserError as error:
        return str(error)
    return None


def fork(order: dict[str, Any]) -> tuple[int, str | None]:
    """Save in a child; its exit status (negative for a signal), and what it told."""
    gate, go = os.pipe()
    TOLD[:] = bytes(len(TOLD))
    child = os.fork()
    if child == 0:
        os.close(go)
        os.read(gate, 1)
        failure = save(order)
        if failure is not None:
            TOLD[: len(failure.encode())] = failure.encode()
        os._exit(0 if failure is None else 2)
    answer(child)
    sys.stdin.readline()
    os.write(go, b"!")
    _, status = os.waitpid(child, 0)
    os.close(go)
    os.close(gate)
    return os.waitstatus_to_exitcode(status), TOLD[:].rstrip(b"\0").decode() or None


def sound(run_dir: Path) -> list[int]:
    """Steps of the committed checkpoints; every one must verify, and load to what was saved."""
    steps = []
    for path in RunFolder(run_dir).committed():
        verify_and_load(path, LOADED)
        steps.append(LOADED.progress.step)
        assert bool((LOADED.model.get_parameter("wte.weight") == steps[-1]).all())
    return steps


def answer(value: Any) -> None:
    """A line of JSON."""
    print(json.dumps(value), flush=True)


def main() -> None:
    """Take orders until there are no more."""
    answer("ready")
    for line in sys.stdin:
        order = json.loads(line)
        if order.get("prepare"):  # here, so that the children find everything imported
            assert save(order) is None
            answer(None)
            continue
        status, told = fork(order)
        checkpoints = Path(order["run_dir"]) / "checkpoints"
        left = [path.name for path in checkpoints.iterdir()] if checkpoints.exists() else []
        try:
            steps: list[int] | str = sound(Path(order["run_dir"]))
        except (UserError, AssertionError) as error:
            steps = f"{type(error).__name__}: {error}"
        sweep(checkpoints)
        again = save({**order, "largest_file": resource.RLIM_INFINITY})  # what the next start of the run does
        answer({"status": status, "told": told, "left": left, "sound": steps, "again": again})


if __name__ == "__main__":
    main()
