"""Texts and tokenizers that the tests of several modules share."""

import random
from collections.abc import Callable, Iterator
from pathlib import Path

from gpt.data import tokenizer_builders
from gpt.data.byte_level import END_OF_TEXT
from gpt.data.tokenizer import Tokenizer
from gpt.data.tokenizer_builders import (
    build_byte_tokenizer,
    build_char_tokenizer,
    build_gpt2_tokenizer,
    train_bpe_tokenizer,
)

WHITE_SPACE = [" ", "  ", "\n", "\n\n", "\r\n", "\t", "\u00a0", "\u3000", "\u0301", "\u2028", "\x85"]
TEXT = "def main():\n    return 'héllo 🙂'  # 12345 it's\r\n\n\n\tx = y\n" * 20


def fuzz_text() -> str:
    """Return a text with characters from all of Unicode, white space of every kind, and very long words."""
    draw = random.Random(0)
    planes = [chr(draw.randrange(0x110000)) for _ in range(4000)]
    letters = [c for c in planes if not 0xD800 <= ord(c) < 0xE000]
    ascii_runs = ["".join(draw.choices(" \n\tab'sZ09.,_-", k=draw.randrange(1, 12))) for _ in range(2000)]
    controls = [chr(c) for c in range(32)] + ["\x7f", "\u2028", "\ufeff", "👩‍👩‍👧", "é", "é"]
    pieces = letters + ascii_runs + controls * 3 + [END_OF_TEXT, "a" * 3000, " " * 3000]
    draw.shuffle(pieces)
    return "".join(pieces)


def random_short_texts() -> Iterator[str]:
    """Yield texts in which letters, signs and white space of every kind meet in every way."""
    draw = random.Random(0)
    pieces = [*"ab1!.é字。あ\ue000🙂\u0301", "'s", *WHITE_SPACE]
    for _ in range(1500):
        yield "".join(draw.choices(pieces, k=draw.randrange(1, 20)))


BUILDERS: dict[str, Callable[[], Tokenizer]] = {
    "byte": build_byte_tokenizer,
    "char": lambda: build_char_tokenizer(fuzz_text()),
    "bpe": lambda: train_bpe_tokenizer([TEXT, Path(tokenizer_builders.__file__).read_text()], 400),
    "gpt2": build_gpt2_tokenizer,
}
