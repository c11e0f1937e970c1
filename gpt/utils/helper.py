"""A few small functions that several layers need."""

import errno
import hashlib
import itertools
import math
import os
from collections.abc import Iterable, Sequence
from enum import IntEnum
from pathlib import Path

from gpt.errors import UserError

IGNORED = -100
"""Target that does not count in the loss, such as padding: the `ignore_index` of torch."""

_MASK = 2**64 - 1


class Purpose(IntEnum):
    """Purpose of random bits: the second part of every address, so that no two uses share bits."""

    ORDER = 1
    OFFSET = 2
    FORWARD = 3
    TEXT = 4
    MIXTURE = 5
    INIT = 6


def random_bits(*address: int) -> int:
    """Return 64 random bits folded from `address`, and from nothing else.

    Randomness is addressed, not consumed: `random_bits(seed, Purpose.FORWARD, step, micro_batch)` is the same on every
    machine, so no generator has a state to save. The mixer is SplitMix64's (Steele, Lea, Flood 2014, "Fast splittable
    pseudorandom number generators").

    >>> random_bits(1337, 5)
    18305536251264625655

    Args:
        address: integers; 64 bits of each count.
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
        follow_links: whether `path` may be a symbolic link; if not, opening one is an error (except on Windows).

    Raises:
        OSError: the file cannot be read.
    """
    flags = os.O_RDONLY | getattr(os, "O_BINARY", 0) | (0 if follow_links else getattr(os, "O_NOFOLLOW", 0))
    with open(os.open(path, flags), "rb", buffering=0) as file:  # noqa: PTH123
        return hashlib.file_digest(file, "sha256").hexdigest()


def format_si(number: float, unit: str) -> str:
    """Return a quantity for people: three digits, an SI prefix and the unit.

    >>> format_si(498.2e9, "FLOP/s"), format_si(512, "B")
    ('498 GFLOP/s', '512 B')
    """
    return _scale(number, ("", "k", "M", "G", "T", "P", "E")) + unit


def format_count(number: float) -> str:
    """Return a count for people; its noun follows after a space.

    >>> format_count(1_557_611_200) + " parameters", format_count(17_040) + " tokens/s"
    ('1.56 B parameters', '17 k tokens/s')
    """
    return _scale(number, ("", "k", "M", "B", "T")).rstrip()


def format_percent(fraction: float) -> str:
    """Return a share for people, which is 0% only if it is 0.

    >>> format_percent(0.5284), format_percent(0.00032)
    ('52.8%', '0.03%')
    """
    return f"{fraction:.1%}" if abs(fraction) >= 0.0005 else f"{100 * fraction:.1g}%"


def format_duration(seconds: float) -> str:
    """Return a time for people.

    >>> format_duration(69), format_duration(4 * 86400 + 3 * 3600 + 59)
    ('0:01:09', '4 d 3 h')
    """
    if not math.isfinite(seconds):
        return "unknown"
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    days, rest = divmod(hours, 24)
    return f"{days:,} d {rest} h" if days else f"{hours}:{minutes:02d}:{seconds:02d}"


def _scale(number: float, prefixes: Sequence[str]) -> str:
    """Return the number in three digits, a space and the prefix of its power of 1000."""
    power = 0
    while power < len(prefixes) - 1 and math.isfinite(number) and abs(number) >= 999.5:  # shown as 1000 if not divided
        number, power = number / 1000, power + 1
    digits = f"{number:,.0f}" if abs(number) >= 999.5 else f"{number:.3g}"
    return f"{digits} {prefixes[power]}"


def plural(count: int, noun: str, suffix: str = "s") -> str:
    """Return a count with its noun, in the plural unless the count is 1.

    >>> plural(1, "file"), plural(2000, "file"), plural(2, "process", "es")
    ('1 file', '2,000 files', '2 processes')
    """
    return f"{count} {noun}" if count == 1 else f"{count:,} {noun}{suffix}"


def format_ranks(ranks: Sequence[int]) -> str:
    """Return ranks for people, rows of three and more shortened.

    >>> format_ranks([1]), format_ranks([0, 1]), format_ranks([1, 4, 5, 6, 7])
    ('rank 1', 'rank 0 and rank 1', 'rank 1 and ranks 4 to 7')
    """
    names: list[str] = []
    for _, members in itertools.groupby(enumerate(sorted(ranks)), key=lambda item: item[1] - item[0]):
        row = [rank for _, rank in members]
        names += [f"ranks {row[0]} to {row[-1]}"] if len(row) > 2 else [f"rank {rank}" for rank in row]
    return " and ".join(filter(None, [", ".join(names[:-1]), names[-1]]))


def unique_names(names: Iterable[str]) -> list[str]:
    """Return the names without repeats: the second of two equal ones becomes NAME-2.

    >>> unique_names(["a", "b", "a"])
    ['a', 'b', 'a-2']
    """
    unique: list[str] = []
    for name in names:
        count, candidate = 1, name
        while candidate in unique:
            count += 1
            candidate = f"{name}-{count}"
        unique.append(candidate)
    return unique


def printable(text: str) -> str:
    """Escape control characters except newline and tab, so that generated text cannot control a terminal."""
    return "".join(c if c.isprintable() or c in "\n\t" else repr(c)[1:-1] for c in text)


def first_line(error: BaseException) -> str:
    """Return the first line of an exception's message, or its type if it has none."""
    lines: Iterable[str] = (line.strip() for line in str(error).splitlines())
    return next((line for line in lines if line), type(error).__name__)


def describe_mistake(error: BaseException) -> str | None:
    """Return one line for an error that a user can fix; None for a fault of the program."""
    if isinstance(error, UserError):
        return str(error)
    if isinstance(error, OSError):
        is_full = error.filename is not None and error.errno in (errno.ENOSPC, errno.EDQUOT)
        remedy = "; free space there" if is_full else ""
        return f"{error.filename or 'output'}: {error.strerror or error}{remedy}"
    return _describe_shortage(error)


def _describe_shortage(error: BaseException) -> str | None:
    """Return one line if memory or processes ran out."""
    text = str(error)
    if isinstance(error, RuntimeError) and "can't start new thread" in text:
        return "the system starts no more threads; raise its limits of memory and processes (ulimit -u, ulimit -v)"
    runs_out = isinstance(error, RuntimeError) and ("allocate" in text or "out of memory" in text)
    if isinstance(error, MemoryError) or runs_out:
        return f"not enough memory: {first_line(error)}"
    return None
