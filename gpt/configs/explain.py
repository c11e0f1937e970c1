"""Say in one line what is wrong with a configuration: where, which value, and the nearest that would do."""

import difflib
import re
from collections.abc import Mapping, Sequence
from typing import Any

from pydantic import BaseModel, ValidationError

from gpt.configs.base import Config


def explain_error(error: ValidationError, model: type[Config], *, as_flag: bool = True) -> str:
    """The first of pydantic's errors as one line: where, which value, what it should be."""
    first, *others = error.errors(include_url=False)
    path = _field_path(first["loc"], model)
    place = "--" + ".".join(path).replace("_", "-") if as_flag else ".".join(path)
    value, context = first["input"], first.get("ctx", {})
    if first["type"] == "value_error":  # a model's own check: its message names its fields and values
        section = "" if not path else f"{'.'.join(path)}: " if isinstance(value, dict) else f"{place} {value!r}: "
        return f"{section}{context['error']}"
    if first["type"] == "extra_forbidden":
        known = [flag[2:].replace("-", "_") for flag in flags_of(model)]
        return f"unknown key {place}; {nearest_name(place, known)}"
    if first["type"] == "literal_error":
        choices = re.findall(r"'([^']*)'", context["expected"])
        close = difflib.get_close_matches(str(value), choices, n=1, cutoff=0.5)
        hint = f"did you mean {close[0]}? " if close else ""
        return f"{place} {value}: {hint}one of {', '.join(choices)}"
    expected = _EXPECTED.get(first["type"], first["msg"][0].lower() + first["msg"][1:]).format(**context)
    for other in others:  # a field that is a number or a word has an error for each
        if other["type"] == "literal_error" and _field_path(other["loc"], model) == path:
            expected += " or " + other["ctx"]["expected"].replace("'", "")
    return f"{place} {value}: {expected}"


def _field_path(location: Sequence[str | int], model: type[BaseModel]) -> list[str]:
    """The names of a field and its sections, without what pydantic adds: places in lists, members of unions."""
    path: list[str] = []
    section: Any = model
    for part in location:
        if not (isinstance(section, type) and issubclass(section, BaseModel)):
            break
        path.append(str(part))
        section = section.model_fields[part].annotation if part in section.model_fields else None
    return path


def nearest_name(word: str, known: Sequence[str] | Mapping[str, Any]) -> str:
    """Return a hint that names the member of `known` nearest to `word`, or all of a few."""
    names = list(known)
    close = difflib.get_close_matches(word, names, n=1, cutoff=0.5)
    if not close:  # `--lr` is far from every flag by spelling, but is the tail or the section of one
        close = [name for name in names if word.strip("-") in re.split(r"[.-]+", name)][:1]
    if close:
        return f"did you mean {close[0]}?"
    return f"one of {', '.join(names)}" if len(names) < 20 else "gpt train --help lists them all"


def flags_of(model: type[BaseModel], prefix: str = "--") -> list[str]:
    """Return every flag of a configuration model, sections included."""
    flags: list[str] = []
    for name, field in model.model_fields.items():
        flag = prefix + (field.alias or name).replace("_", "-")
        kind = field.annotation
        if isinstance(kind, type) and issubclass(kind, BaseModel):
            flags += flags_of(kind, f"{flag}.")
        elif kind is bool:
            flags += [flag, f"{prefix}no-{name.replace('_', '-')}"]
        else:
            flags.append(flag)
    return flags


_EXPECTED = {
    "int_parsing": "expected a whole number",
    "int_from_float": "expected a whole number",
    "int_type": "expected a whole number",
    "float_parsing": "expected a number",
    "float_type": "expected a number",
    "finite_number": "expected a finite number",
    "greater_than_equal": "must be at least {ge}; nearest: {ge}",
    "greater_than": "must be greater than {gt}",
    "less_than_equal": "must be at most {le}; nearest: {le}",
    "less_than": "must be less than {lt}",
    "string_too_short": "must not be empty",
    "too_short": "must not be empty",
}
