"""Base class, shared field types and the field walk of every configuration model."""

from collections.abc import Iterator
from pathlib import Path
from typing import Annotated

from pydantic import BaseModel, BeforeValidator, ConfigDict
from pydantic.fields import FieldInfo

from gpt.configs.user_folders import expand_home

POSITIONAL = "positional"
"""`Annotated[..., POSITIONAL]` makes a field of a command an argument without a flag."""
MAX_COUNT = 10**15
"""Upper bound for counts of steps or tokens, far above any real run."""


def _parse_path(value: object) -> object:
    if value == "":
        raise ValueError("an empty path; name a file or folder")
    return expand_home(str(value)) if isinstance(value, (str, Path)) else value


FilePath = Annotated[Path, BeforeValidator(_parse_path)]
"""A path that a user gives, `~` expanded; rejects the empty one, which would mean the current folder."""


class Config(BaseModel):
    """A frozen section of the configuration; the string under each field is its help text."""

    model_config = ConfigDict(
        frozen=True,
        extra="forbid",
        use_attribute_docstrings=True,
        allow_inf_nan=False,
        validate_default=True,
    )


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
