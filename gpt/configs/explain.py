"""Error messages about a configuration, one line each: the place, the value, and the nearest valid one."""

import difflib
import re
from collections.abc import Mapping, Sequence
from typing import Any

from pydantic import BaseModel, ValidationError

from gpt.configs.base import POSITIONAL, Config, walk_fields
from gpt.configs.presets import PRESETS


def explain_validation_error(error: ValidationError, model: type[Config], *, as_flag: bool = True) -> str:
    """Return the first of pydantic's errors as one line; `as_flag` names a field by its flag, else by its key."""
    first, *others = error.errors(include_url=False)
    path = _get_field_path(first["loc"], model)
    place = "--" + ".".join(path).replace("_", "-") if as_flag else ".".join(path)
    value, context = first["input"], first.get("ctx", {})
    if first["type"] == "value_error":  # raised by a model's own check, whose message names fields and values
        section = "" if not path else f"{'.'.join(path)}: " if isinstance(value, dict) else f"{place} {value!r}: "
        return f"{section}{context['error']}"
    if first["type"] == "extra_forbidden":
        known = [flag[2:].replace("-", "_") for flag in list_flags(model)]
        return f"unknown key {place}; {suggest_name(place, known)}"
    if first["type"] == "literal_error":
        choices = re.findall(r"'([^']*)'", context["expected"])
        close = difflib.get_close_matches(str(value), choices, n=1, cutoff=0.5)
        hint = f"did you mean {close[0]}? " if close else ""
        return f"{place} {value}: {hint}one of {', '.join(choices)}"
    expected = _EXPECTED.get(first["type"], first["msg"][0].lower() + first["msg"][1:]).format(**context)
    for other in others:  # a field that is a number or a word has an error for each
        if other["type"] == "literal_error" and _get_field_path(other["loc"], model) == path:
            word = other["ctx"]["expected"].replace("'", "")
            expected = f"{expected[:-1]} or {word})" if expected.endswith(")") else f"{expected} or {word}"
    return f"{place} {value}: {expected}"


def explain_usage_error(message: str, argv: Sequence[str], model: type[Config], prog: str) -> str:
    """Return one line for a command line that tyro rejects: an unknown flag, a flag without value, a missing argument.

    Args:
        message: text that tyro printed.
        argv: the command line.
        model: configuration that it was parsed for.
        prog: name of the command, such as `gpt sample`.
    """
    known = {*list_flags(model), "--help"}
    for word in argv:
        if word.startswith("--") and word.split("=")[0].replace("_", "-") not in known:
            return explain_unknown_argument(word, argv, model, prog)
    flag = re.search(r"Missing value for argument\W+(--[a-z][\w.-]*)", message)
    if flag:
        return f"{flag[1]} needs a value"
    required = [
        name.upper() if POSITIONAL in field.metadata else f"--{name} {name.upper()}"
        for name, field in model.model_fields.items()
        if field.is_required()
    ]
    return f"usage: {prog} {' '.join(required)} [--flags]; see {prog} --help"


def explain_unknown_argument(word: str, argv: Sequence[str], model: type[Config], prog: str) -> str:
    """Return one line for `word`, which is no flag or value that `model` has a place for."""
    flags = list_flags(model)
    before = argv[argv.index(word) - 1] if word in argv[1:] else ""
    joined = next((given.removesuffix(f"={word}") for given in argv if given.endswith(f"={word}")), "")
    for switch in (before.replace("_", "-"), joined.replace("_", "-")):
        off = re.sub(r"([a-z-]+)$", r"no-\1", switch.removeprefix("--"))
        if switch and f"--{off}" in flags:
            return f"{switch} takes no value: write {switch} or --{off}"
    if not word.startswith("-"):
        hint = f"; a preset comes first: {' '.join(prog.split()[:2])} {word}" if word in PRESETS else ""
        return f"unexpected argument {word!r}{hint}; see {prog} --help"
    flag = word.split("=")[0].replace("_", "-")
    return f"unknown flag {flag}; {suggest_name(flag, flags)}"


def suggest_name(word: str, known: Sequence[str] | Mapping[str, Any]) -> str:
    """Return a hint that names the member of `known` nearest to `word`, or all of a few."""
    names = list(known)
    close = difflib.get_close_matches(word, names, n=1, cutoff=0.5)
    if not close:  # `--lr` is far from every flag by spelling, but is the tail or the section of one
        close = [name for name in names if word.strip("-") in re.split(r"[.-]+", name)][:1]
    if close:
        return f"did you mean {close[0]}?"
    return f"one of {', '.join(names)}" if len(names) < 20 else "gpt train --help lists them all"


def list_flags(model: type[BaseModel]) -> list[str]:
    """Return every flag of a configuration model, sections and `--no-` forms included."""
    flags: list[str] = []
    for path, field in walk_fields(model):
        section, _, name = path.replace("_", "-").rpartition(".")
        prefix = f"--{section}." if section else "--"
        flags.append(prefix + name)
        if field.annotation is bool:
            flags.append(f"{prefix}no-{name}")
    return flags


def _get_field_path(location: Sequence[str | int], model: type[BaseModel]) -> list[str]:
    """Return a field's name and its sections', without list indices and union members, which pydantic adds."""
    path: list[str] = []
    section: Any = model
    for part in location:
        if not (isinstance(section, type) and issubclass(section, BaseModel)):
            break
        path.append(str(part))
        section = section.model_fields[part].annotation if part in section.model_fields else None
    return path


_EXPECTED = {
    "int_parsing": "expected a whole number",
    "int_from_float": "expected a whole number",
    "int_type": "expected a whole number",
    "bool_parsing": "expected true, false or none",
    "float_parsing": "expected a number",
    "float_type": "expected a number",
    "finite_number": "expected a finite number",
    "greater_than_equal": "must be at least {ge} (nearest: {ge})",
    "greater_than": "must be greater than {gt}",
    "less_than_equal": "must be at most {le} (nearest: {le})",
    "less_than": "must be less than {lt}",
    "string_too_short": "must not be empty",
    "too_short": "must not be empty",
}
"""pydantic's error type -> text of the message."""
