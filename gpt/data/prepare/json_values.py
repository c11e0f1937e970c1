"""JSON that is no JSON lines: an array of records or a few pretty-printed ones, read one by one in bounded memory."""

import codecs
import json
from collections.abc import Iterator
from typing import IO

READ_LETTERS = 2**16
MAX_VALUE_LETTERS = 2**30
"""Letters of one record; a longer one is an error."""
_MARGIN = 16
"""Letters before the end of what was read in which an error may come from its end, as within a number or an escape."""
_SPACE = " \t\n\r"
# The value of a huge integer is of no use here, and Python refuses to convert one of 5,000 digits.
DECODER = json.JSONDecoder(parse_int=float)


def read_json_values(file: IO[bytes]) -> Iterator[object]:
    """Yield the elements of an array, or else the values that follow each other.

    Raises:
        ValueError, RecursionError: the content is no JSON; nothing after this place can be read.
    """
    text = _Text(file)
    if text.skip_space() != "[":
        while text.skip_space():
            yield text.read_value()
        return
    text.skip_letter()
    if text.skip_space() != "]":
        yield text.read_value()
        while (letter := text.skip_space()) == ",":
            text.skip_letter()
            text.skip_space()
            yield text.read_value()
        if not letter:
            raise ValueError("ends in the middle of an array")
        if letter != "]":
            raise ValueError(f"{letter!r} instead of , or ] after an element")
    text.skip_letter()
    if letter := text.skip_space():
        raise ValueError(f"{letter!r} after the end of the array")


class _Text:
    """Text of a file, read piece by piece."""

    def __init__(self, file: IO[bytes]):
        self._file = file
        self._decoder = codecs.getincrementaldecoder("utf-8-sig")("surrogateescape")
        self._buffer, self._at, self._is_at_end = "", 0, False

    def skip_space(self) -> str:
        """Move to the next letter that is no space, and return it; nothing at the end."""
        while True:
            while self._at < len(self._buffer):
                letter = self._buffer[self._at]
                if letter not in _SPACE:
                    return letter
                self._at += 1
            if self._is_at_end:
                return ""
            self._read_more()

    def skip_letter(self) -> None:
        self._at += 1

    def read_value(self) -> object:
        """Return the JSON value at this place."""
        while True:
            try:
                value, end = DECODER.raw_decode(self._buffer, self._at)
            except json.JSONDecodeError as error:
                may_be_cut = error.msg.startswith("Unterminated") or error.pos >= len(self._buffer) - _MARGIN
                if self._is_at_end or not may_be_cut:
                    raise
            else:
                if end < len(self._buffer) or self._is_at_end:
                    self._at = end
                    return value
            if len(self._buffer) - self._at > MAX_VALUE_LETTERS:
                raise ValueError(f"a record of {MAX_VALUE_LETTERS} letters or more")
            self._read_more()

    def _read_more(self) -> None:
        """Read as much again as is unread, so that a long value is decoded only a few times."""
        unread = self._buffer[self._at :]
        content = self._file.read(max(READ_LETTERS, len(unread)))
        self._buffer, self._at = unread + self._decoder.decode(content, final=not content), 0
        self._is_at_end = not content
