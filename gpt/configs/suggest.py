"""Nearest names and values: what a word that is not known may mean, by spelling or by its name in other trainers."""

import difflib
import re
from collections.abc import Mapping, Sequence
from typing import Any

from gpt.configs.synonyms import ADVICE, FLAG_SYNONYMS, VALUE_SYNONYMS, WORD_SYNONYMS

DASHES = "-\u2010\u2011\u2012\u2013\u2014\u2212"
"""Hyphen, and the dashes that word processors make of one."""
MIN_SIMILARITY = 0.6
MIN_TAIL_SIMILARITY = 0.75
"""Lowest similarity of a name to the last part of another."""
MAX_SUGGESTIONS = 3


def suggest_flag(word: str, flags: Sequence[str], help_command: str) -> str:
    """Return a hint on the flag that an unknown one may mean.

    Args:
        word: the unknown flag, without a value.
        flags: the known ones.
        help_command: command that lists them.
    """
    names = {flag.removeprefix("--"): flag for flag in flags}
    return _suggest_field(word, names) or f"{help_command} lists them all"


def suggest_key(word: str, keys: Sequence[str]) -> str:
    """Return a hint on the dotted field name that an unknown one may mean."""
    return _suggest_field(word, {key.replace("_", "-"): key for key in keys}) or "docs/configuration.md lists them all"


def suggest_name(word: str, known: Sequence[str] | Mapping[str, Any]) -> str:
    """Return a hint that names the member of `known` nearest to `word`, or all of them."""
    synonym = WORD_SYNONYMS.get(word.lower())
    close = [synonym] if synonym else difflib.get_close_matches(word.lower(), list(known), n=1, cutoff=0.5)
    return f"did you mean {close[0]}?" if close else f"one of {', '.join(known)}"


def suggest_choice(value: str, choices: Sequence[str]) -> str | None:
    """Return the word in `choices` that `value` may mean, if any.

    >>> suggest_choice("gpu", ["auto", "cpu", "cuda", "mps"])
    'cuda'
    """
    word = re.sub(r":\d+$", "", value.strip().lower().replace("_", "-"))  # cuda:0
    spelled = {choice.replace("_", "-"): choice for choice in choices}
    if word in spelled:
        return spelled[word]
    meant = [choice for choice in VALUE_SYNONYMS.get(word, ()) if choice in choices]
    close = meant or difflib.get_close_matches(word, choices, n=1, cutoff=0.5)
    return close[0] if close else None


def read_number(text: str) -> float | None:
    """Return the number that a text means in a notation that a field may not accept, or None.

    >>> read_number("1e3"), read_number("10k"), read_number("1,000"), read_number("0x10"), read_number("50%")
    (1000.0, 10000.0, 1000.0, 16.0, 0.5)
    """
    compact = text.strip().lower().replace("_", "").replace(" ", "")
    if re.fullmatch(r"[+-]?0x[0-9a-f]{1,15}", compact):
        return float(int(compact, 16))
    number = re.fullmatch(r"([+-]?)(\d{1,3}(?:,\d{3})+|\d*\.?\d+(?:e[+-]?\d{1,3})?|\d+\.)([kmbgt%]?)", compact)
    if not number:
        return None
    value = float(number[1] + number[2].replace(",", "")) * _UNITS[number[3]]
    return value if abs(value) < 1e18 else None


_UNITS = {"": 1.0, "k": 1e3, "m": 1e6, "b": 1e9, "g": 1e9, "t": 1e12, "%": 0.01}


def _suggest_field(word: str, names: Mapping[str, str]) -> str | None:
    """Return a hint on the field that `word` may mean, or None.

    Args:
        word: a flag or a dotted name.
        names: dotted name with hyphens -> name in the hint.
    """
    name = re.sub(r"^no-(.+\.)", r"\1no-", word.strip(DASHES).lower().replace("_", "-"))
    for candidate in (name, name.rpartition(".")[2]):  # `training.lr`, too
        if candidate in ADVICE:
            return ADVICE[candidate]
        found = _translate(candidate, names) or [names[each] for each in _match_tail(candidate, names)]
        if found:
            return _join(found)
    found = [names[each] for each in _match_section(name, names) or _match_spelling(name, names)]
    return _join(found) if found else None


def _join(names: Sequence[str]) -> str:
    *others, last = names[:MAX_SUGGESTIONS]
    return f"did you mean {', '.join(others)}{' or ' if others else ''}{last}?"


def _translate(name: str, names: Mapping[str, str]) -> list[str]:
    """Return the fields, each perhaps with a value, that other trainers call `name`."""
    found = []
    for meaning, synonyms in FLAG_SYNONYMS.items():
        known, _, value = meaning.partition(" ")
        if known in names and name in synonyms.split():
            found.append(f"{names[known]} {value}".strip())
    return found


def _match_tail(name: str, names: Mapping[str, str]) -> list[str]:
    return [known for known in names if name in (known.rpartition(".")[2], known.replace(".", "-"))]


def _match_section(name: str, names: Mapping[str, str]) -> list[str]:
    return [known for known in names if known.startswith(f"{name}.")]


def _match_spelling(name: str, names: Mapping[str, str]) -> list[str]:
    def similarity(known: str) -> tuple[float, float]:
        full = difflib.SequenceMatcher(None, name, known).ratio()
        tail = difflib.SequenceMatcher(None, name, known.rpartition(".")[2]).ratio()
        return max(full if full >= MIN_SIMILARITY else 0, tail if tail >= MIN_TAIL_SIMILARITY else 0), full

    best = max(names, key=similarity, default=None)
    return [best] if best is not None and similarity(best)[0] else []
