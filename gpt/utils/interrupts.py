"""The answer to Ctrl-C, at once in every phase of the program.

Python handles a signal between two instructions of its main thread. While that thread learns a tokenizer in Rust, waits
for a compiler or multiplies matrices, Ctrl-C has no effect, and what it breaks there reports errors of its own. So the
main thread blocks SIGINT, and a thread of its own waits for it:

    handler of SIGINT          what Ctrl-C does
    -----------------          ----------------
    Python's own               ends this process and those that it started, with status 130
    one that is installed      calls it (`StopSignal` stops the run after a step); if it raises KeyboardInterrupt, as
                               above

Processes that are started later inherit the block, so a compiler does not report that it was interrupted.
"""

import contextlib
import os
import signal
import sys
import threading
from typing import NoReturn

from gpt.utils import launch
from gpt.utils.process_tree import list_descendants

INTERRUPTED = 130
"""Exit status after Ctrl-C, as shells report it."""
THREAD_NAME = "interrupts"
ERASE_LINE = b"\x1b[2K"
"""Control sequence that erases a progress bar, on which the terminal has echoed ^C."""


def answer_interrupts() -> None:
    """Start the thread that answers Ctrl-C, unless it is there; for programs, before heavy imports."""
    if not hasattr(signal, "pthread_sigmask"):  # Windows: Python raises KeyboardInterrupt in the main thread
        return
    if any(thread.name == THREAD_NAME for thread in threading.enumerate()):
        return
    signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGINT])
    threading.Thread(target=_answer, name=THREAD_NAME, daemon=True).start()


def interrupt() -> None:
    """Report the interrupt on rank 0, and end this process and those that it started."""
    if launch.speaks_first():
        write_error("gpt: interrupted")
    leave(INTERRUPTED)


def write_error(line: str) -> None:
    """Write a line to stderr from any thread, whatever the main thread is doing."""
    with contextlib.suppress(OSError):
        if sys.stderr is not None and sys.stderr.isatty():
            os.write(2, b"\r" if launch.has_dumb_terminal() else b"\r" + ERASE_LINE)
        os.write(2, line.encode(errors="backslashreplace") + b"\n")


def leave(status: int) -> NoReturn:
    """End this process and those that it started, without waiting for anything.

    Files are complete or absent at any moment, as after a kill, so there is nothing to clean up.
    """
    for pid in list_descendants(os.getpid()):
        with contextlib.suppress(OSError):
            os.kill(pid, signal.SIGKILL)
    os._exit(status)


def _answer() -> None:
    while True:
        signal.sigwait([signal.SIGINT])
        handler = signal.getsignal(signal.SIGINT)
        if handler is signal.SIG_IGN:  # the program was started in the background, or by nohup
            continue
        if handler is signal.default_int_handler or not callable(handler):
            interrupt()
            continue
        try:
            handler(signal.SIGINT, None)
        except KeyboardInterrupt:
            interrupt()
