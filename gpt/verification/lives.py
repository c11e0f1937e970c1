"""Processes that train, started to be killed: one life of a run each."""

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

MAIN = Path(__file__).resolve().parents[1] / "main.py"
PRELOADED = ["torch._dynamo", "gpt.commands.train", "gpt.pipeline"]
"""What takes seconds to import, loaded once and there after every fork; an optimizer is what asks for torch._dynamo."""
PROCESSES = Path("/proc")
_GONE = 0.01
"""Seconds between two looks whether a killed process has left."""


class TrainingProcess(Protocol):
    """A start of a run, in one process or in several."""

    def poll(self) -> int | None:
        """Its exit status; None while it lives."""
        ...

    def kill(self) -> None:
        """SIGKILL to every process of it; they are gone when this returns."""
        ...


Start = Callable[[Sequence[str], Path], TrainingProcess]
"""Arguments of `gpt`, file for what it says -> the process."""


def launcher_for(ranks: int) -> Start:
    """How lives of so many ranks are started: forked from a process that has torch, or by torchrun."""
    if ranks > 1:
        return lambda arguments, log: _Launched(ranks, arguments, log)
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    return lambda arguments, log: _Forked(context, arguments, log)


class _Forked:
    """`python gpt/main.py ARGUMENTS` in a fork of a process that has imported what it needs and computed nothing."""

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
            except ProcessLookupError:  # it has not made its group yet
                self._process.kill()
        self._process.join()


def _run_main(arguments: list[str], log: Path) -> None:
    os.setsid()
    with log.open("ab") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    sys.argv = [str(MAIN), *arguments]
    runpy.run_path(str(MAIN), run_name="__main__")


class _Launched:
    """`torchrun gpt/main.py ARGUMENTS`."""

    def __init__(self, ranks: int, arguments: Sequence[str], log: Path):
        launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"]
        with log.open("ab") as file:
            self._process = subprocess.Popen(
                [*launcher, str(MAIN), *arguments],
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    def poll(self) -> int | None:
        return self._process.poll()

    def kill(self) -> None:
        """The launcher is stopped first, for it gives each rank a session of its own and would start it again."""
        if self._process.poll() is not None:
            return
        self._process.send_signal(signal.SIGSTOP)
        ranks = _descendants(self._process.pid)
        self._process.kill()
        for pid in ranks:
            try:
                os.kill(pid, signal.SIGKILL)
            except ProcessLookupError:  # it came to its end meanwhile
                continue
        self._process.wait()
        while any(_lives(pid) for pid in ranks):
            time.sleep(_GONE)


def _descendants(ancestor: int) -> list[int]:
    """Processes that `ancestor` started, and theirs."""
    children: dict[int, list[int]] = {}
    for entry in PROCESSES.iterdir():
        if entry.name.isdigit() and (stat := _stat(int(entry.name))) is not None:
            children.setdefault(int(stat[1]), []).append(int(entry.name))
    found, rest = list[int](), [ancestor]
    while rest:
        own = children.get(rest.pop(), [])
        found += own
        rest += own
    return found


def _lives(pid: int) -> bool:
    """Whether a process still has its files; one that nobody has waited for has none."""
    stat = _stat(pid)
    return stat is not None and stat[0] != "Z"


def _stat(pid: int) -> list[str] | None:
    """State, parent and more (proc(5)), which stand behind the program's name; None if there is no such process."""
    try:
        return (PROCESSES / str(pid) / "stat").read_text(errors="replace").rpartition(")")[2].split()
    except OSError:
        return None
