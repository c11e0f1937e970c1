"""Error messages about a configuration, one line each: the place, the value, and the nearest valid one."""

import math
import re
from collections.abc import Sequence
from typing import Annotated, Any

from pydantic import BaseModel, TypeAdapter, ValidationError

from gpt.configs.fields import find_field, is_list, list_flags
from gpt.configs.suggest import read_number, suggest_choice, suggest_key

MAX_SHOWN_CHARACTERS = 80


def explain_validation_error(error: ValidationError, model: type[BaseModel], *, as_flag: bool = True) -> str:
    """Return the first of pydantic's errors as one line; `as_flag` names a field by its flag, else by its key."""
    first, *others = error.errors(include_url=False)
    path = _get_field_path(first["loc"], model)
    place = "--" + ".".join(path).replace("_", "-") if as_flag else ".".join(path)
    value, context = first["input"], first.get("ctx", {})
    if first["type"] == "value_error":  # raised by a model's own check, whose message names fields and values
        section = "" if not path else f"{'.'.join(path)}: " if isinstance(value, dict) else f"{place} {value!r}: "
        return f"{section}{context['error']}"
    shown = _format_value(value)
    if first["type"] == "extra_forbidden":
        known = [flag[2:].replace("-", "_") for flag in list_flags(model)]
        return f"unknown key {place}; {suggest_key(place, known)}"
    if first["type"] == "literal_error":
        choices = re.findall(r"'([^']*)'", context["expected"])
        close = suggest_choice(str(value), choices)
        hint = f"did you mean {close}? " if close else ""
        return f"{place} {shown}: {hint}one of {', '.join(choices)}"
    expected = _EXPECTED.get(first["type"], first["msg"][0].lower() + first["msg"][1:]).format(**context)
    for other in others:  # a field that is a number or a word has an error for each
        if other["type"] == "literal_error" and _get_field_path(other["loc"], model) == path:
            word = re.findall(r"'([^']*)'", other["ctx"]["expected"])[0]  # the first is a hint; --help lists all
            expected = f"{expected[:-1]} or {word})" if expected.endswith(")") else f"{expected} or {word}"
    if first["type"] in _NUMBER_PARSING and isinstance(value, str):
        expected += _suggest_number(value, model, path, is_integer=first["type"].startswith("int"))
    return f"{place} {shown}: {expected}"


def _suggest_number(text: str, model: type[BaseModel], path: Sequence[str], *, is_integer: bool) -> str:
    """Return a hint on the number that `text` means in another notation, such as 1e3 or 10k; empty if it means none."""
    number = read_number(text)
    if number is None:
        return "; separate values by spaces" if re.fullmatch(r"[^,\s]+(,[^,\s]+)+", text) else ""
    candidates = sorted({math.floor(number), math.ceil(number)}) if is_integer else [number]
    nearest = [f"{candidate:g}" if not is_integer else str(candidate) for candidate in candidates]
    valid = [shown for shown in nearest if _is_valid(shown, model, path)]
    return f" (nearest: {' or '.join(valid)})" if valid else ""


def _is_valid(value: str, model: type[BaseModel], path: Sequence[str]) -> bool:
    field = find_field(model, ".".join(path))
    if field is None:
        return False
    try:
        annotation: Any = Annotated[field.annotation, *field.metadata]
        TypeAdapter(annotation).validate_python([value] if is_list(field.annotation) else value)
    except ValidationError:
        return False
    return True


def _format_value(value: Any) -> str:
    """Return a value for a message: quoted if its ends would not be seen, and cut if it is long."""
    text = str(value)
    if isinstance(value, str) and (not value or value != value.strip()):
        text = repr(value)
    return text if len(text) <= MAX_SHOWN_CHARACTERS else f"{text[:MAX_SHOWN_CHARACTERS]}..."


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
    "int_parsing_size": "expected a whole number",
    "bool_parsing": "expected true, false or none",
    "float_parsing": "expected a number",
    "float_type": "expected a number",
    "finite_number": "expected a finite number",
    "greater_than_equal": "must be at least {ge} (nearest: {ge})",
    "greater_than": "must be greater than {gt:g}",
    "less_than_equal": "must be at most {le} (nearest: {le})",
    "less_than": "must be less than {lt:g}",
    "string_too_short": "must not be empty",
    "too_short": "must not be empty",
}
"""pydantic's error type -> text of the message."""
_NUMBER_PARSING = ("int_parsing", "int_from_float", "float_parsing")
