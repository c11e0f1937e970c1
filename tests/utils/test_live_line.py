import logging
import time
from collections.abc import Iterator

import pytest
from rich.text import Text

from gpt.utils import live_line
from gpt.utils.live_line import LiveLine
from gpt.utils.terminal import RunConsole
from tests.utils.screen import Screen

pytestmark = pytest.mark.usefixtures("capable_terminal")

TEXT = "step 1/10  " + "#" * 40 + "  end"


def build_console(screen: Screen) -> RunConsole:
    class Resized(RunConsole):
        @property
        def width(self) -> int:
            return screen.columns

    return Resized(file=screen)


@pytest.fixture
def screen() -> Iterator[Screen]:
    yield Screen(80)


def wait_for(screen: Screen, text: str) -> None:
    deadline = time.monotonic() + 10
    while text not in screen.lines[-1] and time.monotonic() < deadline:
        time.sleep(0.01)
    assert text in screen.lines[-1]


def test_lines_scroll_above_and_the_line_is_gone_at_the_end(screen: Screen) -> None:
    console = build_console(screen)
    line = LiveLine(console, lambda columns: Text(TEXT))
    line.start()
    line.paint()
    for number in range(3):
        with line.pause():
            console.write_text(f"line {number}")
        line.paint()
    assert screen.lines == ["line 0", "line 1", "line 2", TEXT]
    line.stop()
    assert screen.lines == ["line 0", "line 1", "line 2", ""]
    line.paint()
    assert screen.lines[-1] == ""


@pytest.mark.parametrize("columns", [60, 40, 20, 7, 200])
def test_resized_terminal_keeps_no_remains(screen: Screen, columns: int) -> None:
    console = build_console(screen)
    line = LiveLine(console, lambda columns: Text(TEXT[:columns]))
    line.paint()
    screen.resize(columns)
    with line.pause():
        console.write_text("above")
    line.paint()
    assert screen.lines == ["above", TEXT[: max(1, columns - live_line.FREE_COLUMNS)]]


def test_echoed_interrupts_are_erased_with_the_line(screen: Screen) -> None:
    line = LiveLine(build_console(screen), lambda columns: Text("#" * columns))
    line.paint()
    screen.write("^C^C")
    line.erase()
    assert screen.lines == [""]


def test_line_moves_while_the_program_computes(screen: Screen) -> None:
    line = LiveLine(build_console(screen), lambda columns: Text(f"{time.monotonic():.3f}"))
    line.start()
    deadline, frames = time.monotonic() + 10, set()
    while len(frames) < 3 and time.monotonic() < deadline:
        frames.add(screen.lines[-1])
        time.sleep(0.01)
    line.stop()
    assert len(frames) >= 3


def test_messages_of_loggers_are_printed_above(screen: Screen) -> None:
    console = build_console(screen)
    handler = logging.StreamHandler(screen)
    logging.getLogger().addHandler(handler)
    line = LiveLine(console, lambda columns: Text(TEXT))
    line.start()
    try:
        wait_for(screen, TEXT)
        logging.getLogger("gpt.training").warning("a warning")
        wait_for(screen, TEXT)
    finally:
        line.stop()
        logging.getLogger().removeHandler(handler)
    assert screen.lines == ["a warning", ""]
    assert not any(isinstance(item, live_line._Eraser) for item in logging.getLogger("gpt").handlers)


def test_short_work_shows_nothing(screen: Screen) -> None:
    line = LiveLine(build_console(screen), lambda columns: Text(TEXT), delay=60.0)
    line.start()
    time.sleep(2 * live_line.SECONDS_PER_FRAME)
    line.stop()
    assert screen.raw == ""


def test_nothing_is_painted_without_a_capable_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "dumb")
    screen = Screen(80)
    line = LiveLine(build_console(screen), lambda columns: Text(TEXT))
    line.start()
    time.sleep(2 * live_line.SECONDS_PER_FRAME)
    line.stop()
    assert screen.raw == ""


def test_line_of_a_closed_terminal_ends_quietly(screen: Screen) -> None:
    line = LiveLine(build_console(screen), lambda columns: Text(TEXT))

    def fail(text: str) -> int:
        raise OSError(5, "Input/output error")

    screen.write = fail  # type: ignore[method-assign]
    line.start()
    assert line._thread is not None
    line._thread.join(10)
    assert not line._thread.is_alive()
