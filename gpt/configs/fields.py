"""Walk over the fields of a configuration model: dotted names, flags and types."""

from collections.abc import Iterator
from pathlib import Path
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic import BaseModel
from pydantic.fields import FieldInfo

POSITIONAL = "positional"
"""`Annotated[..., POSITIONAL]` makes a field of a command an argument without a flag."""

SWITCH = "switch"
"""`Annotated[Literal["auto", "on", "off"], SWITCH]` makes `--NAME` alone mean on, and `--no-NAME` mean off."""


def get_section(field: FieldInfo) -> type[BaseModel] | None:
    """Return the model of a field that is a section, or None for a plain field."""
    kind = field.annotation
    return kind if isinstance(kind, type) and issubclass(kind, BaseModel) else None


def walk_fields(model: type[BaseModel], prefix: str = "") -> Iterator[tuple[str, FieldInfo]]:
    """Yield (dotted name, field) for every field of `model`, sections included, in order."""
    for name, field in model.model_fields.items():
        path = prefix + (field.alias or name)
        section = get_section(field)
        if section is None:
            yield path, field
        else:
            yield from walk_fields(section, f"{path}.")


def find_field(model: type[BaseModel], path: str) -> FieldInfo | None:
    """Return the field or section with a dotted name, or None if `model` has none."""
    name, _, rest = path.partition(".")
    field = next((field for key, field in model.model_fields.items() if name == (field.alias or key)), None)
    if field is None or not rest:
        return field
    section = get_section(field)
    return find_field(section, rest) if section else None


def format_flag(path: str) -> str:
    """Return the flag of a dotted field name.

    >>> format_flag("lr.max_lr")
    '--lr.max-lr'
    """
    return "--" + path.replace("_", "-")


def format_off_flag(path: str) -> str:
    """Return the flag that turns a switch off.

    >>> format_off_flag("model.qk_norm")
    '--model.no-qk-norm'
    """
    section, dot, name = path.rpartition(".")
    return format_flag(f"{section}{dot}no-{name}")


def list_flags(model: type[BaseModel]) -> list[str]:
    """Return every flag of a configuration model, sections and `--no-` forms included."""
    flags: list[str] = []
    for path, field in walk_fields(model):
        if POSITIONAL not in field.metadata:
            flags.append(format_flag(path))
            if is_switch(field):
                flags.append(format_off_flag(path))
    return flags


def is_switch(field: FieldInfo) -> bool:
    """Return whether the flag of a field may stand alone and has a `--no-` form."""
    return field.annotation is bool or SWITCH in field.metadata


def get_alternatives(annotation: Any) -> list[Any]:
    """Return the types of a union, without their metadata."""
    types = get_args(annotation) if get_origin(annotation) in (Union, UnionType) else [annotation]
    return [get_args(kind)[0] if get_origin(kind) is Annotated else kind for kind in types]


def get_choices(annotation: Any) -> tuple[str, ...]:
    """Return the words that a type allows; empty if it is no Literal and no optional switch."""
    if annotation is bool:
        return ("true", "false")
    return get_args(annotation) if get_origin(annotation) is Literal else ()


def is_list(annotation: Any) -> bool:
    """Return whether a field takes several values."""
    return get_origin(annotation) is tuple


def takes_text(annotation: Any) -> bool:
    """Return whether a field takes any text: a path, a name or a prompt."""
    return any(kind in (str, Path) for kind in get_alternatives(annotation))


def format_default(value: Any) -> str:
    """Return a default for people, as it is written on a command line.

    >>> format_default(("def ", "class")), format_default(()), format_default(True)
    ("'def ' class", 'none', 'on')
    """
    if isinstance(value, bool):
        return "on" if value else "off"
    if isinstance(value, tuple):
        return " ".join(repr(member) if " " in str(member) else str(member) for member in value) or "none"
    return "none" if value is None else str(value)


def format_type(annotation: Any) -> str:
    """Return the placeholder of a field's value in a help text.

    >>> format_type(int | Literal["auto"])
    'INT|{auto}'
    """
    if is_list(annotation):
        return f"[{format_type(get_args(annotation)[0])} ...]"
    kinds = [kind for kind in get_alternatives(annotation) if kind is not NoneType]
    return "|".join(
        f"{{{','.join(get_choices(kind))}}}" if get_choices(kind) else getattr(kind, "__name__", "VALUE").upper()
        for kind in kinds
    )
