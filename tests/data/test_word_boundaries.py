import numpy as np
import pytest

from gpt.data.word_boundaries import (
    LOOKBEHIND_BYTES,
    WORD_BOUNDARY_IN_TEXT,
    WORD_BOUNDARY_IN_UTF8,
    split_at_words,
)
from tests.data.tokenizer_kinds import fuzz_text, random_short_texts


def boundaries_in_text(text: str) -> list[int]:
    """Return the boundaries that the pattern for `str` finds, as byte offsets."""
    points = np.frombuffer(text.encode("utf-32-le"), dtype=np.uint32)
    sizes = 1 + (points >= 0x80) + (points >= 0x800) + (points >= 0x10000)  # in UTF-8
    offsets = np.concatenate(([0], np.cumsum(sizes)))
    return [int(offsets[match.start()]) for match in WORD_BOUNDARY_IN_TEXT.finditer(text)]


def boundaries_in_utf8(text: str) -> list[int]:
    return [match.start() for match in WORD_BOUNDARY_IN_UTF8.finditer(text.encode())]


def test_both_patterns_find_the_same_boundaries() -> None:
    for text in (*random_short_texts(), fuzz_text()[:20_000]):
        assert boundaries_in_utf8(text) == boundaries_in_text(text)


@pytest.mark.parametrize("plane", range(17))
def test_both_patterns_agree_on_every_character_before_and_after_a_newline(plane: int) -> None:
    points = [point for point in range(plane << 16, (plane + 1) << 16) if not 0xD800 <= point < 0xE000]
    for form in ("{}\nx\n", "x\n{}\n", "{} "):
        lines = [form.format(chr(point)) for point in points]
        text = "".join(lines)
        assert boundaries_in_utf8(text) == boundaries_in_text(text), (plane, form)


def test_a_boundary_depends_on_the_lookbehind_bytes_alone() -> None:
    for text in random_short_texts():
        content = text.encode()
        for boundary in boundaries_in_utf8(text):
            start = max(0, boundary - LOOKBEHIND_BYTES)
            assert WORD_BOUNDARY_IN_UTF8.match(content[start:], boundary - start)


def test_split_pieces_join_to_the_text_and_have_the_minimum_size() -> None:
    text = fuzz_text()
    for min_chars in (1, 10, 1000):
        pieces = list(split_at_words(text, min_chars))
        assert "".join(pieces) == text
        assert all(len(piece) >= min_chars for piece in pieces[:-1])
    assert list(split_at_words("", 5)) == []
