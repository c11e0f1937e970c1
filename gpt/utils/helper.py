"""A few pure functions that several layers need."""

import hashlib
import os
from collections.abc import Iterable
from enum import IntEnum
from pathlib import Path

IGNORED = -100
"""A target that is not counted: padding, which predicts nothing. torch's own default for it."""

_MASK = 2**64 - 1


class Purpose(IntEnum):
    """What a number is drawn for: the second part of every address, so that no two uses share numbers."""

    ORDER = 1
    OFFSET = 2
    FORWARD = 3
    TEXT = 4
    MIXTURE = 5


def random_bits(*address: int) -> int:
    """A 64-bit number that depends on every part of `address`, and on nothing else.

    Randomness here is addressed, not consumed: `draw(seed, Purpose.FORWARD, step, micro_batch)` is the same on every
    machine, so no generator's state has to be saved. The mixer is SplitMix64's (Steele, Lea, Flood 2014, "Fast
    splittable pseudorandom number generators").
    """
    state = 0
    for part in address:
        state = (state ^ (part & _MASK)) * 0xD1342543DE82EF95 + 0x9E3779B97F4A7C15 & _MASK
        state = (state ^ (state >> 30)) * 0xBF58476D1CE4E5B9 & _MASK
        state = (state ^ (state >> 27)) * 0x94D049BB133111EB & _MASK
        state ^= state >> 31
    return state


def sha256_of_file(path: Path, *, follow_links: bool = True) -> str:
    """Return the SHA-256 of a file's bytes, in hexadecimal.

    Args:
        path: the file.
        follow_links: whether a symbolic link stands for the file that it points to; else opening it is an error, where
            the system can tell.

    Raises:
        OSError: the file cannot be read.
    """
    flags = os.O_RDONLY | getattr(os, "O_BINARY", 0) | (0 if follow_links else getattr(os, "O_NOFOLLOW", 0))
    with open(os.open(path, flags), "rb", buffering=0) as file:  # noqa: PTH123
        return hashlib.file_digest(file, "sha256").hexdigest()


def format_si(number: float) -> str:
    """A count for people: 1234567 -> '1.23M'."""
    for size, unit in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(number) >= size:
            return f"{number / size:.3g}{unit}"
    return f"{number:.3g}"


def plural(count: int, noun: str, suffix: str = "s") -> str:
    """'1 file', '2 files'; '2 processes' with suffix 'es'."""
    return f"{count} {noun}" if count == 1 else f"{count:,} {noun}{suffix}"


def unique_names(names: Iterable[str]) -> list[str]:
    """Names without repeats: of equal ones the second becomes NAME-2."""
    apart: list[str] = []
    for name in names:
        count, unique = 1, name
        while unique in apart:
            count += 1
            unique = f"{name}-{count}"
        apart.append(unique)
    return apart


def printable(text: str) -> str:
    """What a model writes must not steer the terminal: control characters but newline and tab are shown, not sent."""
    return "".join(c if c.isprintable() or c in "\n\t" else repr(c)[1:-1] for c in text)


def first_line(error: BaseException) -> str:
    """An exception in one line."""
    lines: Iterable[str] = (line.strip() for line in str(error).splitlines())
    return next((line for line in lines if line), type(error).__name__)
