"""The console of a command: the abilities of a terminal, and text laid out for its width."""

import os
import sys
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any

from rich.cells import cell_len
from rich.console import Console, ConsoleDimensions
from rich.segment import Segment, Segments

from gpt.utils.launch import has_dumb_terminal

GAP = "  "
"""Between two columns, and between two numbers of a line."""


class RunConsole(Console):
    """A console that prints text as it is: no markup, no emoji codes, no highlighting; nothing cut or padded.

    It raises BrokenPipeError when the output is closed, where rich would end the process.

    Attributes:
        is_interactive: the cursor can be moved, so a line can be painted again: a terminal that is not dumb, outside
            of continuous integration (CI), whose logs keep every line.
        has_unicode: the output has characters to draw with.

    Args:
        stderr: print on stderr instead of stdout.
        options: options of rich's Console.
    """

    def __init__(self, *, stderr: bool = False, **options: Any):
        stream = options.get("file") or (sys.stderr if stderr else sys.stdout)
        is_dumb = has_dumb_terminal()
        is_terminal = options.setdefault("force_terminal", _is_terminal(stream))  # FORCE_COLOR makes no file a terminal
        options.setdefault("force_interactive", is_terminal and not is_dumb and not os.environ.get("CI"))
        if is_terminal and is_dumb:  # unless it is given both sizes, rich takes 80 columns for granted there
            options |= {"width": options.get("width") or _find_columns(stream), "height": options.get("height") or 25}
        if os.environ.get("NO_COLOR"):
            options["color_system"] = None  # rich's own no_color leaves bold and dim text
        super().__init__(
            stderr=stderr, markup=False, emoji=False, highlight=False, soft_wrap=True, force_jupyter=False, **options
        )
        self.has_unicode = self.encoding.startswith("utf") and not is_dumb

    def on_broken_pipe(self) -> None:
        """Raise the error to the caller."""
        raise

    @property
    def size(self) -> ConsoleDimensions:
        """Size of the terminal, now; COLUMNS makes it narrower, but no wider than it is."""
        width, height = super().size
        columns = _find_columns(self.file)
        return ConsoleDimensions(min(width, columns or width), height)

    @size.setter
    def size(self, size: tuple[int, int]) -> None:
        self._width, self._height = size

    @property
    def columns(self) -> int | None:
        """Width to lay out lines for, now; None for a file or a pipe, where a line has any length."""
        return self.width if self.is_terminal else None

    def write_text(self, text: str) -> None:
        """Print a text and a line break; its own line breaks and tabs stay as they are."""
        self.print(Segments([Segment(text + "\n")]), end="")

    def write_rows(self, rows: Mapping[str, str], *, unbroken: Collection[str] = ()) -> None:
        """Print rows of a name and a value, whose lines are indented to a column of their own.

        Args:
            rows: name -> value.
            unbroken: names of the rows whose values are not broken, such as paths and commands, which users copy.
        """
        indent = max(map(cell_len, rows), default=0) + len(GAP)
        for name, value in rows.items():
            columns = None if name in unbroken else self.columns
            self.write_text(wrap(value, columns, indent=indent, head=name + " " * (indent - cell_len(name))))

    def write_table(self, rows: Iterable[Sequence[str]]) -> None:
        """Print rows whose columns are as wide as their longest cell; nothing is padded at the end of a line."""
        table = list(rows)
        widths = [max(map(cell_len, column)) for column in zip(*table, strict=True)]
        for row in table:
            cells = (cell + " " * (width - cell_len(cell)) for cell, width in zip(row, widths, strict=True))
            self.write_text(GAP.join(cells).rstrip(" "))


def wrap(text: str, columns: int | None, *, indent: int = 0, head: str = "") -> str:
    """Break a text between words where a line would be too long; the terminal wraps a word that fits no line.

    Args:
        text: one line.
        columns: width of the terminal; None breaks nothing.
        indent: columns before every line but the first.
        head: beginning of the first line.
    """
    return wrap_parts(text.split(" "), columns, separator=" ", indent=indent, head=head)


def wrap_parts(
    parts: Sequence[str], columns: int | None, *, separator: str = GAP, indent: int = 0, head: str = ""
) -> str:
    """Join parts, with a line break before a part that fits on the next line and not on this one.

    Args:
        parts: texts that are not broken.
        columns: width of the terminal; None breaks nothing.
        separator: between two parts of a line.
        indent: columns before every line but the first.
        head: beginning of the first line.
    """
    lines = [head + "".join(parts[:1])]
    for part in parts[1:]:
        line = lines[-1] + separator + part
        if columns is not None and cell_len(line) > columns >= indent + cell_len(part):
            lines[-1] = lines[-1].rstrip(" ")  # of several spaces between two words
            lines.append(" " * indent + part)
        else:
            lines[-1] = line
    return "\n".join(lines)


def _is_terminal(stream: Any) -> bool:
    try:
        return bool(stream.isatty())
    except (AttributeError, ValueError):  # no stream, or a closed one
        return False


def _find_columns(stream: Any) -> int | None:
    try:
        return os.get_terminal_size(stream.fileno()).columns or None
    except (AttributeError, ValueError, OSError):
        return None
