"""Progress of work that a person waits for: a bar over a known total, or the time of work without one."""

import logging
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.cells import cell_len
from rich.text import Text

from gpt.utils.helper import format_count, format_duration, format_si
from gpt.utils.live_line import LiveLine
from gpt.utils.terminal import GAP, RunConsole

log = logging.getLogger(__name__)

SECONDS_PER_MESSAGE = 60.0
"""Time between two messages where there is no terminal to paint a bar on."""
DELAY_SECONDS = 0.5
"""Time after which work without a total is shown."""
MAX_BAR_COLUMNS, MIN_BAR_COLUMNS = 30, 6


class Progress:
    """Bytes and tokens that some work has done, and its time.

    Args:
        description: name of the work.
        total: bytes of all the work; 0 if unknown.
        clock: monotonic, in seconds.
    """

    def __init__(self, description: str, total: int, clock: Callable[[], float] = time.monotonic):
        self._description, self._total, self._clock = description, total, clock
        self._began = clock()
        self._bytes = self._tokens = 0

    def advance(self, n_bytes: int, n_tokens: int) -> None:
        """Count bytes and tokens that are done."""
        self._bytes += n_bytes
        self._tokens += n_tokens

    @property
    def parts(self) -> list[str]:
        """Texts to show, the most important ones first."""
        elapsed = self._clock() - self._began
        parts = [self._description]
        if self._bytes:
            total = f" of {format_si(self._total, 'B')}" if self._total else ""
            parts.append(format_si(self._bytes, "B") + total)
        times = f"{format_duration(elapsed)} elapsed"
        if 0 < self._bytes < self._total:
            times += f", {format_duration(elapsed * (self._total - self._bytes) / self._bytes)} left"
        parts.append(times)
        if self._tokens and elapsed:
            parts.append(f"{format_count(self._tokens / elapsed)} tokens/s")
        return parts

    def render(self, columns: int, *, unicode: bool = True) -> Text:
        """Return a line of the fullest form that fits."""
        parts = self.parts
        while parts and cell_len(GAP.join(parts)) > columns:
            parts.pop()
        room = min(columns - cell_len(GAP.join(parts)) - len(GAP), MAX_BAR_COLUMNS)
        if not self._total or room < MIN_BAR_COLUMNS or len(parts) < 2:
            return Text(GAP.join(parts))
        bar = draw_bar(self._bytes / self._total, room, unicode=unicode)
        return Text(parts[0] + GAP) + bar + Text(GAP + GAP.join(parts[1:]))


def draw_bar(fraction: float, columns: int, *, unicode: bool) -> Text:
    """Return a bar of some columns, the fraction of which is full."""
    full, empty = ("━", "─") if unicode else ("#", "-")
    n_full = max(0, min(columns, int(fraction * columns)))
    return Text(full * n_full, style="green") + Text(empty * (columns - n_full), style="dim")


@contextmanager
def progress_bar(description: str, total: int) -> Iterator[Callable[[int, int], None]]:
    """Show a bar over `total` bytes on stderr until the block ends; without a terminal, a message every minute.

    Yields:
        advance: function to call with the bytes and the tokens done since its last call.
    """
    console = RunConsole(stderr=True)
    progress = Progress(description, total)
    next_message = time.monotonic() + SECONDS_PER_MESSAGE

    def advance(n_bytes: int, n_tokens: int) -> None:
        nonlocal next_message
        progress.advance(n_bytes, n_tokens)
        if not console.is_interactive and time.monotonic() >= next_message:
            next_message = time.monotonic() + SECONDS_PER_MESSAGE
            log.info("%s", ", ".join(progress.parts))

    with _live_line(console, progress, delay=0.0):
        yield advance


@contextmanager
def work_line(description: str, *, is_shown: bool = True) -> Iterator[None]:
    """Show on stderr that work without a known total goes on, with its time, until the block ends.

    Args:
        description: name of the work.
        is_shown: whether this process is the one that shows it.
    """
    if not is_shown:
        yield
        return
    with _live_line(RunConsole(stderr=True), Progress(description, 0), delay=DELAY_SECONDS):
        yield


@contextmanager
def _live_line(console: RunConsole, progress: Progress, *, delay: float) -> Iterator[None]:
    """Paint a line on the terminal until the block ends.

    Args:
        console: the terminal.
        progress: text of the line.
        delay: seconds until the line appears.
    """
    line = LiveLine(console, lambda columns: progress.render(columns, unicode=console.has_unicode), delay)
    line.start()
    try:
        yield
    finally:
        line.stop()
