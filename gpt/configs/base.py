"""What every configuration model shares."""

from pathlib import Path
from typing import Annotated

from pydantic import BaseModel, BeforeValidator, ConfigDict

MAX_COUNT = 10**15
"""Above every sensible count of steps or tokens."""


def _named(value: object) -> object:
    if value == "":
        raise ValueError("names no path")
    return value


FilePath = Annotated[Path, BeforeValidator(_named)]
"""A path that a user gives; an empty one would be the current folder."""


class Config(BaseModel):
    """A frozen section of the configuration; the string under each field is its help text."""

    model_config = ConfigDict(
        frozen=True,
        extra="forbid",
        use_attribute_docstrings=True,
        allow_inf_nan=False,
        validate_default=True,
    )
