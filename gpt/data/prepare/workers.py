"""Which process works on which part.

    this process                                    worker process, one of n
    ------------                                    ------------------------
    WorkerPool(folder, settings, n)
      sends {"folder", "settings"}          --->    main -> _serve -> PartWorker(folder, settings)
    WorkerPool.run(action, parts)
      a thread for each worker takes the next part,
      sends {"action", "part"}              --->      PartWorker.do(action, part)
      reads {"advance": [bytes, tokens]}    <---      progress, some times a second
            {"done": number}                <---      the result is in the folder
            {"user_error"} or {"os_error"}  <---      an error, raised again in this process

With one worker, this process does the work itself. A worker is a program of its own, `main` below, that speaks lines of
JSON: it needs no guard in the user's main module, inherits no threads, and imports no torch. It ends when this process
ends, and this process kills it when there is no more work.
"""

import contextlib
import errno
import json
import os
import queue
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, Self

from gpt.data.prepare.part_worker import Action, Advance, PartWorker, ReadSettings
from gpt.data.prepare.parts import Part
from gpt.errors import UserError

REPORT_BYTES = 2**20
"""Bytes of text between two reports of progress."""


class WorkerPool:
    """Works on parts, several at a time.

    Args:
        folder: path of the unfinished folder.
        settings: how to read and split.
        n_workers: processes, which start at once; with one, this process does the work itself.
    """

    def __init__(self, folder: Path, settings: ReadSettings, n_workers: int):
        self._own_worker = PartWorker(folder, settings) if n_workers <= 1 else None
        self._processes = [_WorkerProcess(folder, settings) for _ in range(n_workers)] if n_workers > 1 else []

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        """End the processes."""
        for process in self._processes:
            process.end()

    def run(self, action: Action, parts: Sequence[Part], advance: Advance) -> None:
        """Do `action` to every part.

        Raises:
            UserError, OSError: what the first failing part raised.
        """
        if self._own_worker is not None:
            for part in parts:
                self._own_worker.do(action, part, advance)
            return
        remaining = iter(parts)
        lock = threading.Lock()
        failures: list[BaseException] = []

        def feed(process: _WorkerProcess) -> None:
            try:
                while not failures:
                    with lock:
                        part = next(remaining, None)
                    if part is None:
                        return
                    process.do(action, part, advance)
            except BaseException as error:
                failures.append(error)

        threads = [threading.Thread(target=feed, args=(process,), daemon=True) for process in self._processes]
        for thread in threads:
            thread.start()
        for thread in threads:
            while thread.is_alive() and not failures:  # a short wait, so that Ctrl-C and failures end the others
                thread.join(0.1)
        if failures:
            raise failures[0]


# A worker ignores Ctrl-C, which reaches the whole process group, also while it starts: this process ends it.
_START = """
import signal, sys
signal.signal(signal.SIGINT, signal.SIG_IGN)
sys.path.insert(0, sys.argv[1])
from gpt.data.prepare.workers import main
main()
"""


class _WorkerProcess:
    """A worker process as this process sees it."""

    def __init__(self, folder: Path, settings: ReadSettings):
        root = str(Path(__file__).parents[3])
        command = [sys.executable, "-P", "-c", _START, root]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, encoding="utf-8")
        self._send({"folder": str(folder), "settings": asdict(settings)})

    def end(self) -> None:
        """Kill the process: an unfinished part is done again by the next preparation."""
        self._process.kill()
        self._process.wait()
        for stream in (self._process.stdin, self._process.stdout):
            with contextlib.suppress(OSError):
                assert stream is not None
                stream.close()

    def do(self, action: Action, part: Part, advance: Advance) -> None:
        """Have the process work on one part.

        Raises:
            UserError, OSError: what the work raised; ChildProcessError if the process ended without an answer.
        """
        self._send({"action": action, "part": part.to_json()})
        assert self._process.stdout is not None
        for line in self._process.stdout:
            match json.loads(line):
                case {"advance": [size, tokens]}:
                    advance(size, tokens)
                case {"user_error": message}:
                    raise UserError(message)
                case {"os_error": [number, text, name]}:
                    raise OSError(number, text, name)
                case {"done": _}:
                    return
        status = self._process.wait()
        how = f"was killed by {signal.Signals(-status).name}" if status < 0 else f"ended with status {status}"
        raise ChildProcessError(errno.ECHILD, f"a process that prepares data {how}")

    def _send(self, message: dict[str, Any]) -> None:
        assert self._process.stdin is not None
        with contextlib.suppress(BrokenPipeError):  # `do` reports the status of a process that ended
            self._process.stdin.write(json.dumps(message) + "\n")
            self._process.stdin.flush()


class _Reporter:
    """Sends progress once for many small documents."""

    def __init__(self, send: Callable[[dict[str, Any]], None]):
        self._send = send
        self._size = self._tokens = 0

    def advance(self, size: int, tokens: int) -> None:
        self._size += size
        self._tokens += tokens
        if self._size >= REPORT_BYTES:
            self.flush()

    def flush(self) -> None:
        self._send({"advance": [self._size, self._tokens]})
        self._size = self._tokens = 0


def main() -> None:
    """Run a worker process: read the settings, then tasks, as lines on stdin; answer on stdout until stdin ends."""
    messages: queue.SimpleQueue[str] = queue.SimpleQueue()
    threading.Thread(target=_listen, args=(messages,), daemon=True).start()
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # so that nothing a library prints looks like an answer

    def send(message: dict[str, Any]) -> None:
        answers.write(json.dumps(message) + "\n")
        answers.flush()

    with contextlib.suppress(BrokenPipeError):  # the process that started this one has ended
        _serve(messages, send)


def _listen(messages: "queue.SimpleQueue[str]") -> None:
    """Pass messages on; end this process when stdin ends, for another preparation may write the same files next."""
    for line in sys.stdin:
        messages.put(line)
    os._exit(0)


def _serve(messages: "queue.SimpleQueue[str]", send: Callable[[dict[str, Any]], None]) -> None:
    job = json.loads(messages.get())
    worker = PartWorker(Path(job["folder"]), ReadSettings(**job["settings"]))
    while True:
        task = json.loads(messages.get())
        part = Part.from_json(task["part"])
        reporter = _Reporter(send)
        try:
            worker.do(task["action"], part, reporter.advance)
            reporter.flush()
            send({"done": part.number})
        except UserError as error:
            send({"user_error": str(error)})
        except BrokenPipeError:
            raise
        except OSError as error:
            send({"os_error": [error.errno, error.strerror, str(error.filename or "")]})
