"""Server process that forks a child for every save, so that a fault can be injected into that save alone.

Python and torch take seconds to start, a fork takes milliseconds. Requests arrive on stdin and answers go to stdout,
one line of JSON each. For each request the server answers with the child's process id, and the child waits for one more
line before it saves, so that strace can be attached to it first.
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
from gpt.utils.atomic_io import remove_leftovers
from gpt.utils.distributed import DistContext
from tests.checkpoint.test_store import make_state, trained_state

torch.set_num_threads(1)
WIDTH = int(sys.argv[1]) if len(sys.argv) > 1 else 8
STATE, LOADED = trained_state(n_embd=WIDTH), make_state(9, WIDTH)
ERROR_MESSAGE = mmap.mmap(-1, 2**16)
"""Memory shared with the child, which stores its error there: a system call might meet the injected fault."""


def save(request: dict[str, Any]) -> str | None:
    """Save a state whose weights equal the step's number, and return the error message, if any."""
    if "max_file_bytes" in request:
        resource.setrlimit(resource.RLIMIT_FSIZE, (request["max_file_bytes"],) * 2)
    step = request["step"]
    config = CheckpointConfig(keep=request["keep"], asynchronous=request["asynchronous"])
    STATE.progress = Progress(step, step)
    STATE.model.get_parameter("wte.weight").data.fill_(step)
    try:
        manager = CheckpointManager(
            RunFolder(Path(request["run_dir"])), config, "{}", DistContext("cpu"), request["resumed_at"]
        )
        manager.save(STATE)
        manager.finish()
    except UserError as error:
        return str(error)
    return None


def fork_and_save(request: dict[str, Any]) -> tuple[int, str | None]:
    """Save in a child, and return its exit status (negative for a signal) and its error message, if any."""
    gate_reader, gate_writer = os.pipe()
    ERROR_MESSAGE[:] = bytes(len(ERROR_MESSAGE))
    child = os.fork()
    if child == 0:
        os.close(gate_writer)
        os.read(gate_reader, 1)
        error = save(request)
        if error is not None:
            ERROR_MESSAGE[: len(error.encode())] = error.encode()
        os._exit(0 if error is None else 2)
    answer(child)
    sys.stdin.readline()
    os.write(gate_writer, b"!")
    _, status = os.waitpid(child, 0)
    os.close(gate_writer)
    os.close(gate_reader)
    return os.waitstatus_to_exitcode(status), ERROR_MESSAGE[:].rstrip(b"\0").decode() or None


def read_valid_steps(run_dir: Path) -> list[int]:
    """Return the steps of the committed checkpoints, and assert that each is valid and holds what was saved."""
    steps = []
    for path in RunFolder(run_dir).list_checkpoints():
        verify_and_load(path, LOADED)
        steps.append(LOADED.progress.step)
        assert bool((LOADED.model.get_parameter("wte.weight") == steps[-1]).all())
    return steps


def answer(value: Any) -> None:
    """Write one line of JSON to stdout."""
    print(json.dumps(value), flush=True)


def main() -> None:
    """Serve requests until stdin is closed.

    The answer to a save holds the child's exit status and error, the entries of the checkpoints folder and the steps of
    its valid checkpoints after the fault, and the error of saving the same step again, as the run's next start would.
    """
    answer("ready")
    for line in sys.stdin:
        request = json.loads(line)
        if request.get("prepare"):  # in this process, so that the children inherit all imports
            assert save(request) is None
            answer(None)
            continue
        status, error_message = fork_and_save(request)
        checkpoints = Path(request["run_dir"]) / "checkpoints"
        entries = [path.name for path in checkpoints.iterdir()] if checkpoints.exists() else []
        try:
            steps: list[int] | str = read_valid_steps(Path(request["run_dir"]))
        except (UserError, AssertionError) as error:
            steps = f"{type(error).__name__}: {error}"
        remove_leftovers(checkpoints)
        retry_error = save({**request, "max_file_bytes": resource.RLIM_INFINITY})
        answer(
            {
                "status": status,
                "error": error_message,
                "entries": entries,
                "valid_steps": steps,
                "retry_error": retry_error,
            }
        )


if __name__ == "__main__":
    main()
