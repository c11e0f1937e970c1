"""Base class and shared field types of every configuration model."""

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Self

from pydantic import BaseModel, BeforeValidator, ConfigDict, ValidationError, field_validator

from gpt.configs.explain import explain_validation_error
from gpt.configs.fields import find_field, get_section, walk_fields
from gpt.configs.suggest import suggest_key
from gpt.configs.user_folders import expand_home
from gpt.errors import UserError

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

    @field_validator("*", mode="after")
    @classmethod
    def _drop_sign_of_zero(cls, value: Any) -> Any:
        return value + 0.0 if isinstance(value, float) else value  # -0.0 would be saved and shown as another value

    def with_(self, **changes: Any) -> Self:
        """Return a copy with other values, checked as those of a command line are.

        A field of a section is named by its dotted name, or by a dict for the section:
        `config.with_(max_steps=10, **{"model.n_layer": 3})`, `config.with_(model={"n_layer": 3})`.

        Raises:
            UserError: a name that is no field, or a value that it does not allow.
        """
        values = self.model_dump(by_alias=True)
        pending = list(changes.items())
        while pending:
            path, value = pending.pop(0)
            field = find_field(type(self), path)
            if field is None:
                known = [name for name, _ in walk_fields(type(self))]
                raise UserError(f"unknown field {path}; {suggest_key(path, known)}")
            if get_section(field) and isinstance(value, Mapping):
                pending += [(f"{path}.{name}", member) for name, member in value.items()]
                continue
            if isinstance(value, Config):
                value = value.model_dump(by_alias=True)  # a later change may name one of its fields
            *sections, name = path.split(".")
            section = values
            for part in sections:
                section = section[part]
            section[name] = value
        try:
            return type(self).model_validate(values)
        except ValidationError as error:
            raise UserError(explain_validation_error(error, type(self), as_flag=False)) from error
