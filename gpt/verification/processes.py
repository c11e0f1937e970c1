"""Processes that train a run and can be killed at any moment, on Linux."""

import contextlib
import multiprocessing
import os
import runpy
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Protocol

from gpt.utils.process_tree import PROC, list_descendants, read_stat

MAIN = Path(__file__).resolve().parents[1] / "main.py"
PRELOADED_MODULES = ["torch._dynamo", "gpt.commands.train", "gpt.pipeline"]
"""Modules that take seconds to import; every fork inherits them. Building an optimizer imports torch._dynamo."""
STOPPED = frozenset({130, 143, -signal.SIGINT, -signal.SIGTERM})
"""Exit statuses after SIGINT and SIGTERM."""
TORCHRUN_FAILED = 1
"""Exit status of torchrun after a rank ended with any other status than 0."""
_EXIT_POLL_SECONDS = 0.01
"""Interval at which to check whether killed ranks have exited."""


class TrainingProcess(Protocol):
    """One launch of a run: a single process, or torchrun with its ranks."""

    def poll(self) -> int | None:
        """Return the exit status, or None while it runs."""
        ...

    def kill(self) -> None:
        """Send SIGKILL to all of its processes and wait until they have exited."""
        ...

    def stop(self, number: signal.Signals) -> None:
        """Send a signal that asks all of its ranks to save their state and end; return at once."""
        ...

    @property
    def was_stopped(self) -> bool:
        """It ended because of such a signal."""
        ...


Launcher = Callable[[Sequence[str], Path], TrainingProcess]
"""Function that launches `gpt ARGUMENTS` and appends its output to a log file."""


def launcher_for(ranks: int) -> Launcher:
    """Return a launcher that forks a preloaded process for one rank, and starts torchrun for several."""
    if ranks > 1:
        return lambda arguments, log: _TorchrunProcess(ranks, arguments, log)
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOADED_MODULES)
    return lambda arguments, log: _ForkedProcess(context, arguments, log)


class _ForkedProcess:
    """`python gpt/main.py ARGUMENTS` in a fork of a server process that has only imported modules."""

    def __init__(self, context: multiprocessing.context.ForkServerContext, arguments: Sequence[str], log: Path):
        self._process = context.Process(target=_run_main, args=(list(arguments), log))
        self._process.start()

    def poll(self) -> int | None:
        return self._process.exitcode

    def kill(self) -> None:
        pid = self._process.pid
        assert pid is not None
        if self._process.is_alive():
            try:
                os.killpg(pid, signal.SIGKILL)
            except ProcessLookupError:  # it has not created its process group yet
                self._process.kill()
        self._process.join()

    def stop(self, number: signal.Signals) -> None:
        pid = self._process.pid
        assert pid is not None
        with contextlib.suppress(ProcessLookupError):  # it has ended meanwhile
            while self._process.is_alive() and os.getpgid(pid) != pid:  # before that it is no run yet
                time.sleep(_EXIT_POLL_SECONDS)
            os.kill(pid, number)

    @property
    def was_stopped(self) -> bool:
        return self.poll() in STOPPED


def _run_main(arguments: list[str], log: Path) -> None:
    try:
        os.setsid()
        with log.open("ab") as file:
            os.dup2(file.fileno(), 1)
            os.dup2(file.fileno(), 2)
        sys.argv = [str(MAIN), *arguments]
        runpy.run_path(str(MAIN), run_name="__main__")
    except KeyboardInterrupt:  # before the program handles it
        os._exit(130)


class _TorchrunProcess:
    """`torchrun gpt/main.py ARGUMENTS`."""

    def __init__(self, ranks: int, arguments: Sequence[str], log: Path):
        torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"]
        with log.open("ab") as file:
            self._process = subprocess.Popen(
                [*torchrun, str(MAIN), *arguments],
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    def poll(self) -> int | None:
        return self._process.poll()

    def kill(self) -> None:
        """Stop torchrun, then kill it and its ranks.

        Each rank has a session of its own, so killing torchrun's process group would miss the ranks; and torchrun
        must be stopped first, or it would react to the ranks' deaths.
        """
        if self._process.poll() is not None:
            return
        self._process.send_signal(signal.SIGSTOP)
        pids = list_descendants(self._process.pid)
        self._process.kill()
        for pid in pids:
            try:
                os.kill(pid, signal.SIGKILL)
            except ProcessLookupError:  # it has exited in the meantime
                continue
        self._process.wait()
        while any(_is_running(pid) for pid in pids):
            time.sleep(_EXIT_POLL_SECONDS)

    def stop(self, number: signal.Signals) -> None:
        """Signal the ranks alone: torchrun would give them half a minute, and then kill them."""
        ranks = [pid for pid in list_descendants(self._process.pid) if str(MAIN) in _read_command(pid)]
        for pid in ranks:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, number)
        if not ranks:
            self._process.terminate()

    @property
    def was_stopped(self) -> bool:
        return self.poll() in STOPPED | {TORCHRUN_FAILED}


def _read_command(pid: int) -> list[str]:
    """Return a process's command line; empty if there is no process."""
    try:
        return (PROC / str(pid) / "cmdline").read_text(errors="replace").split("\0")
    except OSError:
        return []


def _is_running(pid: int) -> bool:
    """Return whether a process still holds its files; a zombie holds none."""
    stat = read_stat(pid)
    return stat is not None and stat[0] != "Z"
