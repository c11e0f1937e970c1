"""A line at the bottom of a terminal that is painted again and again, while other lines scroll above it."""

import logging
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from threading import Event, RLock, Thread

from rich.cells import cell_len
from rich.control import Control
from rich.segment import ControlType
from rich.text import Text

from gpt.utils.terminal import RunConsole

SECONDS_PER_FRAME = 0.25
FREE_COLUMNS = 5
"""Columns right of the line, so that neither the cursor nor the terminal's ^C of two Ctrl-C wraps it."""
LOG_SECONDS = 0.1
"""Time that a log message has to be printed in, before the line is painted again."""
MAX_LOCK_SECONDS = 1.0
"""Time to wait for a frame; a terminal that was stopped (Ctrl-S) takes no more text."""


class LiveLine:
    """Paints a line on a thread of its own, so that it moves while the program computes.

    The cursor stays visible and at the end of the line: a killed process leaves nothing to repair. Messages of the
    package's loggers appear above the line. Nothing is painted on a console that is not interactive.

    Args:
        console: the terminal.
        render: returns the line for a number of columns; called on the thread.
        delay: seconds before the first frame, so that short work shows nothing.
    """

    def __init__(self, console: RunConsole, render: Callable[[int], Text], delay: float = 0.0):
        self._console, self._render = console, render
        self._next_frame = time.monotonic() + delay
        self._lock, self._stopped = RLock(), Event()
        self._painted = ""
        self._eraser = _Eraser(self)
        self._thread: Thread | None = None

    def start(self) -> None:
        """Begin to paint."""
        if self._thread is not None or not self._console.is_interactive:
            return
        thread = Thread(target=self._work, name="live-line", daemon=True)
        try:
            thread.start()
        except RuntimeError:  # the system allows no more threads: a run goes on without the line
            return
        self._thread = thread
        logging.getLogger("gpt").addHandler(self._eraser)

    def stop(self) -> None:
        """Erase the line, and paint it no more."""
        self._stopped.set()
        if self._thread is None:
            return
        logging.getLogger("gpt").removeHandler(self._eraser)
        self._thread.join(MAX_LOCK_SECONDS)
        self._thread = None
        self.erase()

    @contextmanager
    def pause(self) -> Iterator[None]:
        """Erase the line for a block that prints."""
        with self._lock:
            self._erase()
            yield
            self._next_frame = min(self._next_frame, time.monotonic())

    def erase(self) -> None:
        """Erase the line until the next frame, which is some time away."""
        if self._lock.acquire(timeout=MAX_LOCK_SECONDS):
            try:
                self._next_frame = max(self._next_frame, time.monotonic() + LOG_SECONDS)
                self._erase()
            finally:
                self._lock.release()

    def paint(self) -> None:
        """Paint a frame, unless it equals the one that is shown."""
        if not self._console.is_interactive:
            return
        with self._lock:
            text = self._render(max(1, self._console.width - FREE_COLUMNS))
            if text.plain != self._painted and not self._stopped.is_set():
                with self._console:  # one write, so that it does not flicker
                    self._erase()
                    self._console.print(text, end="")
                self._painted = text.plain

    def _erase(self) -> None:
        """Erase every row of the line: a terminal that has become narrower has wrapped it."""
        if self._painted:
            rows_above = (cell_len(self._painted) - 1) // max(1, self._console.width)
            codes = [(ControlType.CARRIAGE_RETURN,), (ControlType.ERASE_IN_LINE, 2)]
            codes += [(ControlType.CURSOR_UP, 1), (ControlType.ERASE_IN_LINE, 2)] * rows_above
            self._console.control(Control(*codes))  # type: ignore[arg-type]
            self._painted = ""

    def _work(self) -> None:
        while not self._stopped.wait(SECONDS_PER_FRAME):
            if time.monotonic() >= self._next_frame:
                try:
                    self.paint()
                except (OSError, ValueError):  # the terminal is gone
                    return


class _Eraser(logging.Handler):
    """Erases the line before the handlers of the root logger print a message."""

    def __init__(self, line: LiveLine):
        super().__init__()
        self._line = line

    def emit(self, record: logging.LogRecord) -> None:
        """Erase the line."""
        self._line.erase()
