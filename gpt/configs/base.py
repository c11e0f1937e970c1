"""What every configuration model shares."""

from pydantic import BaseModel, ConfigDict


class Config(BaseModel):
    """A frozen section of the configuration; the string under each field is its help text."""

    model_config = ConfigDict(
        frozen=True,
        extra="forbid",
        use_attribute_docstrings=True,
        allow_inf_nan=False,
        validate_default=True,
    )
