"""A terminal for tests: keeps what its user would see, also after it was resized."""

import re
from io import StringIO
from itertools import groupby

SEQUENCE = re.compile(r"\x1b\[([0-9;?]*)([A-Za-z])")


class Screen(StringIO):
    """A terminal that wraps long lines, understands the codes of a live line, and refuses all others.

    Args:
        columns: its width.
    """

    def __init__(self, columns: int):
        super().__init__()
        self.columns = columns
        self.rows, self.continues = [""], [False]  # a row that continues is wrapped onto the next one
        self.y = self.x = 0
        self.raw = ""

    def isatty(self) -> bool:
        return True

    def write(self, text: str) -> int:
        self.raw += text
        position = 0
        while position < len(text):
            if match := SEQUENCE.match(text, position):
                self._obey(match[1], match[2])
                position = match.end()
            else:
                self._put(text[position])
                position += 1
        return len(text)

    def resize(self, columns: int) -> None:
        """Wrap every line anew, as terminals do; the cursor stays at the end of the last one."""
        assert not any(self.rows[self.y + 1 :])  # nothing is below the cursor
        del self.rows[self.y + 1 :], self.continues[self.y + 1 :]
        self.continues[-1] = False
        lines = self.lines
        self.columns = columns
        self.rows, self.continues = [], []
        for line in lines:
            pieces = [line[start : start + columns] for start in range(0, len(line), columns)] or [""]
            self.rows += pieces
            self.continues += [True] * (len(pieces) - 1) + [False]
        self.y, self.x = len(self.rows) - 1, len(self.rows[-1])

    @property
    def lines(self) -> list[str]:
        """The lines as they were written, each of one or more rows; without empty rows below the cursor."""
        lines, line = [], ""
        for row, continues in zip(self.rows, self.continues, strict=True):
            line += row
            if not continues:
                lines.append(line)
                line = ""
        while len(lines) > self.y + 1 and not lines[-1]:
            lines.pop()
        return lines

    @property
    def styles(self) -> list[str]:
        """Kinds of the escape sequences that were written, by their last letter."""
        return [key for key, _ in groupby(sorted(match[2] for match in SEQUENCE.finditer(self.raw)))]

    def _put(self, character: str) -> None:
        if character == "\n":
            self.continues[self.y] = False
            self._move_to(self.y + 1)
        elif character == "\r":
            self.x = 0
        else:
            assert character == "\t" or character.isprintable(), f"control character {character!r}"
            if self.x == self.columns:
                self.continues[self.y] = True
                self._move_to(self.y + 1)
            row = self.rows[self.y].ljust(self.x)
            self.rows[self.y] = row[: self.x] + character + row[self.x + 1 :]
            self.x += 1

    def _move_to(self, y: int) -> None:
        self.y, self.x = y, 0
        while len(self.rows) <= y:
            self.rows.append("")
            self.continues.append(False)

    def _obey(self, parameters: str, letter: str) -> None:
        if letter == "A":
            self.y = max(0, self.y - int(parameters or 1))
        elif letter == "K" and parameters == "2":
            self.rows[self.y], self.continues[self.y] = "", False
        else:
            assert letter == "m", f"unknown sequence {parameters}{letter}"
