import fcntl
import os
import pty
import struct
import termios
from io import StringIO
from typing import Any

import pytest
from rich.cells import cell_len

from gpt.utils.terminal import RunConsole, wrap, wrap_parts
from tests.utils.screen import Screen

WIDTHS = (60, 80, 120, 200)


pytestmark = pytest.mark.usefixtures("capable_terminal")


def describe(console: RunConsole) -> tuple[bool, bool]:
    return console.is_terminal, console.is_interactive


@pytest.mark.parametrize(
    ("variables", "on_screen"),
    [
        ({}, (True, True)),
        ({"TERM": "dumb"}, (True, False)),
        ({"TERM": "unknown"}, (True, False)),
        ({"CI": "true"}, (True, False)),
        ({"NO_COLOR": "1"}, (True, True)),
        ({"FORCE_COLOR": "1"}, (True, True)),
    ],
)
def test_only_a_capable_terminal_is_interactive(
    variables: dict[str, str], on_screen: tuple[bool, bool], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert describe(RunConsole(file=Screen(80))) == on_screen
    assert describe(RunConsole(file=StringIO())) == (False, False)


def test_no_color_prints_no_styles(monkeypatch: pytest.MonkeyPatch) -> None:
    screen = Screen(80)
    RunConsole(file=screen).print("bold", style="bold red")
    assert "\x1b[" in screen.raw
    monkeypatch.setenv("NO_COLOR", "1")
    screen = Screen(80)
    RunConsole(file=screen).print("bold", style="bold red")
    assert screen.raw == "bold\n"


@pytest.mark.parametrize(
    ("term", "variable", "expected"),
    [("xterm", "200", (60, 40)), ("xterm", "50", (50, 40)), ("xterm", "", (60, 40)), ("dumb", "200", (60, 40))],
)
def test_variable_makes_no_terminal_wider_and_hides_no_resize(
    term: str, variable: str, expected: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", variable)
    monkeypatch.setenv("TERM", term)
    terminal, end = pty.openpty()
    with os.fdopen(terminal), os.fdopen(end, "w") as file:
        set_columns(terminal, 60)
        console = RunConsole(file=file)
        before = console.columns
        set_columns(terminal, 40)
        assert (before, console.columns) == expected


def set_columns(terminal: int, columns: int) -> None:
    fcntl.ioctl(terminal, termios.TIOCSWINSZ, struct.pack("HHHH", 24, columns, 0, 0))


@pytest.mark.parametrize(
    "text", [":smile: [bold]x[/bold] [/]", "a\tb", "trailing  ", "x" * 500, "один 二 😀", "a\n\nb"]
)
@pytest.mark.parametrize("file", [StringIO, lambda: Screen(60)])
def test_text_is_printed_as_it_is(text: str, file: Any) -> None:
    out = file()
    RunConsole(file=out, width=60).write_text(text)
    assert (out.raw if isinstance(out, Screen) else out.getvalue()) == text + "\n"


@pytest.mark.parametrize("width", WIDTHS)
def test_rows_fit_the_terminal_and_lose_nothing(width: int) -> None:
    rows = {"machine": "a CPU " * 30 + "end", "data": "/a/path/" + "x" * 250, "note": "short"}
    out = Screen(width)
    RunConsole(file=out, width=width).write_rows(rows)
    lines = out.lines[:-1]
    assert all(cell_len(line) <= width for line in lines if "/a/path" not in line)
    assert all(line == line.rstrip() and "…" not in line for line in lines)
    assert " ".join(" ".join(lines).split()) == " ".join(f"{name} {value}" for name, value in rows.items())
    assert lines[0].startswith("machine  a CPU")
    assert lines[1].startswith((" " * 9 + "a CPU", " " * 9 + "CPU", "data"))


def test_rows_of_a_pipe_are_one_line_each() -> None:
    out = StringIO()
    RunConsole(file=out).write_rows({"a": "word " * 100 + "end", "bc": "x"})
    assert out.getvalue() == "a   " + "word " * 100 + "end\nbc  x\n"


@pytest.mark.parametrize("file", [StringIO, lambda: Screen(20)])
def test_table_is_aligned_and_neither_padded_nor_broken(file: Any) -> None:
    out = file()
    RunConsole(file=out, width=20).write_table([("name", "size", "state"), ("日本語", "7 kB", ""), ("a", "", "x" * 30)])
    lines = out.lines[:-1] if isinstance(out, Screen) else out.getvalue().splitlines()
    assert lines == ["name    size  state", "日本語  7 kB", "a             " + "x" * 30]


def test_text_is_broken_between_words_only() -> None:
    assert wrap("one two  three", 8, indent=2) == "one two\n  three"
    assert wrap("one  two", 8) == "one  two"
    assert wrap("one", None) == "one"
    assert wrap("/a/long/path next", 5) == "/a/long/path\nnext"
    assert wrap("日本語 日本語", 8) == "日本語\n日本語"


def test_parts_are_not_broken() -> None:
    assert wrap_parts(["step 1", "loss 2"], 10, indent=4) == "step 1\n    loss 2"
    assert wrap_parts(["step 1", "loss 2"], None) == "step 1  loss 2"
    assert wrap_parts([], 10) == ""
