"""Processes that prepare parts, as many as there are cores.

A worker is `gpt.data.prepare.part_worker` as a program of its own, spoken to in lines of JSON: it needs no guard in the
user's main module, inherits no threads, and imports no torch.
"""

import contextlib
import errno
import json
import signal
import subprocess
import sys
import threading
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, Self

from gpt.data.prepare.part_worker import Action, Advance, Job, PartWorker
from gpt.data.prepare.parts import Part
from gpt.errors import UserError

Task = tuple[int, Part]
"""A part and its number."""


class WorkerPool:
    """Carries out tasks, several at a time.

    Args:
        job: what all tasks have in common.
        n_workers: processes; they start at once. With one, this process does the work itself.
    """

    def __init__(self, job: Job, n_workers: int):
        self._here = PartWorker(job) if n_workers <= 1 else None
        self._processes = [_Process(job) for _ in range(n_workers)] if n_workers > 1 else []

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        """End the processes."""
        for process in self._processes:
            process.end()

    def run(self, action: Action, tasks: Sequence[Task], advance: Advance) -> None:
        """Do `action` to every part.

        Raises:
            UserError, OSError: what the first failing part raised.
        """
        if self._here is not None:
            for index, part in tasks:
                self._here.do(action, index, part, advance)
            return
        queue = iter(tasks)
        lock = threading.Lock()
        failures: list[BaseException] = []

        def serve(process: _Process) -> None:
            try:
                while not failures:
                    with lock:
                        task = next(queue, None)
                    if task is None:
                        return
                    process.do(action, *task, advance)
            except BaseException as error:
                failures.append(error)

        threads = [threading.Thread(target=serve, args=(process,), daemon=True) for process in self._processes]
        for thread in threads:
            thread.start()
        for thread in threads:
            while thread.is_alive() and not failures:  # so that Ctrl-C is heard, and a failure ends the others
                thread.join(0.1)
        if failures:
            raise failures[0]


# Ctrl-C reaches the whole group, also while a worker is still starting; who started it ends it.
_START = """
import signal, sys
signal.signal(signal.SIGINT, signal.SIG_IGN)
sys.path.insert(0, sys.argv[1])
from gpt.data.prepare.part_worker import main
main()
"""


class _Process:
    """A worker process, on the side of those who give it tasks."""

    def __init__(self, job: Job):
        root = str(Path(__file__).parents[2])
        command = [sys.executable, "-P", "-c", _START, root]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, encoding="utf-8")
        self._send(asdict(job))

    def end(self) -> None:
        """Leave no process behind."""
        self._process.kill()  # what it was doing is done again, or was done
        self._process.wait()
        for stream in (self._process.stdin, self._process.stdout):
            with contextlib.suppress(OSError):
                assert stream is not None
                stream.close()

    def do(self, action: Action, index: int, part: Part, advance: Advance) -> None:
        """One task; raises what it raised, and ChildProcessError if the process ends instead of answering."""
        self._send({"action": action, "index": index, "part": part.to_json()})
        assert self._process.stdout is not None
        for line in self._process.stdout:
            match json.loads(line):
                case {"advance": [size, tokens]}:
                    advance(size, tokens)
                case {"mistake": message}:
                    raise UserError(message)
                case {"failure": [number, text, name]}:
                    raise OSError(number, text, name)
                case {"done": _}:
                    return
        status = self._process.wait()
        how = f"was killed by {signal.Signals(-status).name}" if status < 0 else f"ended with status {status}"
        raise ChildProcessError(errno.ECHILD, f"a process that prepares data {how}")

    def _send(self, message: dict[str, Any]) -> None:
        assert self._process.stdin is not None
        with contextlib.suppress(BrokenPipeError):  # its status is told where its answer is awaited
            self._process.stdin.write(json.dumps(message) + "\n")
            self._process.stdin.flush()
