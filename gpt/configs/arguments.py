"""Words of a command line -> words that tyro reads; an unknown flag, a missing value or a stray word is an error here.

tyro then never sees a flag that it does not know, so an error names the word that is wrong and not its neighbour.
"""

import re
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from pydantic import BaseModel

from gpt.configs.fields import (
    POSITIONAL,
    SWITCH,
    format_flag,
    format_off_flag,
    is_list,
    list_flags,
    takes_text,
    walk_fields,
)
from gpt.configs.presets import PRESETS
from gpt.configs.suggest import DASHES, suggest_flag, suggest_name
from gpt.configs.train_config import TrainConfig
from gpt.errors import UserError

VERBS = {
    "train": "train a model, or resume a run",
    "prepare": "turn texts into tokens, once for many runs",
    "sample": "generate text with a trained model",
    "serve": "serve a trained model over HTTP, with OpenAI's API and a page",
    "export": "write a model for transformers or llama.cpp, and prove that it is equal",
    "import": "make a run of a model in Hugging Face's format",
    "parity": "compare a model with the same weights in transformers",
    "data-at": "show the documents that a step of a run was trained on",
    "verify": "compare every checkpoint of a run with its SHA-256 digests",
    "verify-resume": "kill and resume a run again and again; check that it stays bit-exact",
    "selftest": "check that this device computes as the CPU does, and measure it",
    "bench": "measure the speed of a training step, or of a whole run",
}
SHORT_HELP, FULL_HELP = ("-h", "--help"), "--help-all"


@dataclass(frozen=True)
class Flag:
    """A flag of a command."""

    name: str
    kind: Literal["switch", "value", "optional", "list"]
    """optional: its value may be left out."""
    opposite: str = ""
    """Flag that sets a switch the other way."""
    is_text: bool = False
    """Its value is any text, also one that begins with a hyphen."""
    implied: str = ""
    """Its value where it is left out."""
    stands_for: str = ""
    """Word that it is replaced by; empty: none."""


def read_words(argv: Sequence[str], model: type[BaseModel], prog: str) -> list[str]:
    """Check every word of a command line and return the words with each flag's value joined to it by `=`.

    Args:
        argv: the command line after the verb and the preset.
        model: configuration to parse it for.
        prog: name of the command, such as `gpt train debug`.

    Raises:
        UserError: an unknown flag, a flag without its value, a switch with a value, a stray word.
    """
    for word in argv:
        if "\0" in word or (not word.isascii() and any("\ud800" <= c <= "\udfff" for c in word)):
            raise UserError(f"{word!r} is not valid text: remove NUL and bytes that are not UTF-8")
    flags = {flag.name: flag for flag in _list_known_flags(model)}
    free_places = _count_positionals(model)
    words, previous, queue = list[str](), None, deque(argv)
    while queue:
        word = queue.popleft()
        if word == "--":
            return [*words, word, *queue]
        if not looks_like_flag(word):
            if free_places < 1:
                raise UserError(_explain_stray_word(word, previous, flags, prog))
            free_places, previous = free_places - 1, None
            words.append(word)
            continue
        name, equals, value = word.partition("=")
        flag = flags.get(name.replace("_", "-"))
        if flag is None:
            raise UserError(_explain_unknown_flag(name, previous, flags, model, prog))
        if flag.kind == "switch":
            if equals:
                raise UserError(_explain_switch_value(flag))
            words.append(flag.stands_for or flag.name)
        elif flag.kind in ("value", "optional"):
            words.append(f"{flag.name}={value if equals else _take_value(flag, queue, flags)}")
        else:
            words += _take_members(flag, [value] if equals else [], queue)
        previous = flag
    return words


def has_flag(argv: Sequence[str], name: str) -> bool:
    """Return whether a command line sets the field `name` by its flag."""
    return any(word.split("=")[0].replace("_", "-") == format_flag(name) for word in argv)


def looks_like_flag(word: str) -> bool:
    """Return whether a word begins with a hyphen, or a dash in its place, and is no negative number.

    >>> [looks_like_flag(word) for word in ("--seed", "-x", "—seed", "-3", "-.5", "-inf", "-", "x")]
    [True, True, True, False, False, False, False, False]
    """
    is_number = re.match(r"-(\d|\.\d|inf\b|nan\b)", word, flags=re.IGNORECASE)
    return word.startswith(tuple(DASHES)) and len(word) > 1 and not is_number


def explain_unknown_word(word: str) -> str:
    """Return one line for a first word that is no verb and no preset."""
    if Path(word).is_file() and word.endswith("config.json"):
        hint = f"did you mean --config {word}?"
    elif Path(word).exists():
        hint = f"did you mean --data.source {word}?"
    elif "=" in word:
        hint = _suggest_dashes(word, list_flags(TrainConfig))
    else:
        hint = suggest_name(word, [*VERBS, *PRESETS])
    return f"unknown verb or preset {word!r}; {hint}"


def _list_known_flags(model: type[BaseModel]) -> Iterator[Flag]:
    for path, field in walk_fields(model):
        if POSITIONAL in field.metadata:
            continue
        on, off = format_flag(path), format_off_flag(path)
        if SWITCH in field.metadata:
            yield from (Flag(on, "optional", implied="on"), Flag(off, "switch", on, stands_for=f"{on}=off"))
        elif field.annotation is bool:
            yield from (Flag(on, "switch", off), Flag(off, "switch", on))
        elif is_list(field.annotation):
            yield Flag(on, "list", is_text=True)
        else:
            yield Flag(on, "value", is_text=takes_text(field.annotation))
    yield from (Flag(name, "switch") for name in (*SHORT_HELP, FULL_HELP))


def _count_positionals(model: type[BaseModel]) -> float:
    fields = [field for field in model.model_fields.values() if POSITIONAL in field.metadata]
    return float("inf") if any(is_list(field.annotation) for field in fields) else len(fields)


def _take_value(flag: Flag, queue: deque[str], flags: dict[str, Flag]) -> str:
    """Take the next word as the value of `flag`; one that begins with a single hyphen may be a text, such as a prompt.

    Raises:
        UserError: there is none, or it is a flag, and the flag implies none.
    """
    following = queue[0] if queue else ""
    if flag.implied and (not queue or looks_like_flag(following)):
        return flag.implied
    name = following.partition("=")[0].replace("_", "-")
    is_flag = following.startswith("--") or name in flags or f"-{name}" in flags
    if queue and not (looks_like_flag(following) and is_flag):
        return queue.popleft()
    is_value = queue and flag.is_text and name not in flags
    hint = f"; a value that begins with -- is joined by =: {flag.name}={following}" if is_value else ""
    raise UserError(f"{flag.name} needs a value{hint}")


def _take_members(flag: Flag, members: list[str], queue: deque[str]) -> list[str]:
    """Take the words up to the next flag; the first is joined to the flag."""
    while queue and not looks_like_flag(queue[0]):
        members.append(queue.popleft())
    return [f"{flag.name}={members[0]}", *members[1:]] if members else [flag.name]


def _explain_switch_value(flag: Flag) -> str:
    remedy = f"write {flag.name} or {flag.opposite}" if flag.opposite else f"write {flag.name}"
    return f"{flag.name} takes no value: {remedy}"


def _explain_stray_word(word: str, previous: Flag | None, flags: dict[str, Flag], prog: str) -> str:
    """Return one line for a word that no flag before it takes and that has no place of its own."""
    _, verb, *preset = prog.split()
    if word in PRESETS and "--config" in flags:
        if preset:
            return f"unexpected argument {word!r}: {preset[0]} is the preset already; name one of them"
        return f"unexpected argument {word!r}; a preset comes first: gpt {verb} {word}; see {prog} --help"
    if previous is not None and previous.kind == "switch":
        return _explain_switch_value(previous)
    if word in VERBS:
        return f"unexpected argument {word!r}; the verb comes first: gpt {word}"
    if "=" in word:
        return f"unexpected argument {word!r}; {_suggest_dashes(word, list(flags))}"
    return f"unexpected argument {word!r}; see {prog} --help"


def _suggest_dashes(word: str, flags: Sequence[str]) -> str:
    """Return a hint on `name=value`, as other programs write it."""
    name, _, value = word.partition("=")
    if format_flag(name) in flags:
        return f"a flag begins with --: {format_flag(name)}={value}"
    return suggest_flag(name, flags, "gpt train --help-all")


def _explain_unknown_flag(
    name: str, previous: Flag | None, flags: dict[str, Flag], model: type[BaseModel], prog: str
) -> str:
    written = name.replace("_", "-")
    positional = next((field for field, info in model.model_fields.items() if POSITIONAL in info.metadata), None)
    if positional and written == format_flag(positional):
        return f"unknown flag {written}; it has no flag: {prog} {positional.upper()}"
    if previous is not None and previous.kind == "list" and name[1:2] != "-" and f"-{written}" not in flags:
        return f"unknown flag {name}; a value that begins with - is joined by =: {previous.name}={name}"
    helps = FULL_HELP if "--config" in flags else "--help"
    known = [flag for flag in flags if flag not in (*SHORT_HELP, FULL_HELP)]
    return f"unknown flag {written}; {suggest_flag(written, known, f'{prog} {helps}')}"
