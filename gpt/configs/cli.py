"""argv -> configuration: tyro reads the flags, pydantic checks them, and every error is one line.

tyro hands over the values as text and builds plain dicts (`_registry`), so that pydantic checks the whole tree at
once: its errors then carry the full path of a field, and the same code checks a saved config.json.
"""

import contextlib
import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, TypeVar, Union, get_args, get_origin

import tyro
from pydantic import Field, ValidationError
from tyro.constructors import (
    ConstructorRegistry,
    PrimitiveConstructorSpec,
    PrimitiveTypeInfo,
    StructConstructorSpec,
    StructFieldSpec,
    StructTypeInfo,
)

from gpt.configs.base import POSITIONAL, Config, FilePath, get_section
from gpt.configs.explain import explain_unknown_argument, explain_usage_error, explain_validation_error, suggest_name
from gpt.configs.load import load_config
from gpt.configs.presets import PRESETS
from gpt.configs.train_config import HORIZON, TrainConfig
from gpt.configs.user_folders import expand_home
from gpt.errors import UserError

C = TypeVar("C", bound=Config)

VERBS = {
    "train": "train a model, or resume a run",
    "prepare": "turn texts into tokens, once for many runs",
    "sample": "generate text with a trained model",
    "data-at": "show the documents that a step of a run was trained on",
    "verify": "compare every checkpoint of a run with its SHA-256 digests",
    "verify-resume": "kill and resume a run again and again; check that it stays bit-exact",
    "bench": "measure the speed of a training step, or of a whole run",
}


class JsonOutput(Config):
    """Flag of the commands whose result can be printed as JSON."""

    as_json: bool = Field(False, alias="json")
    """Print the result as one JSON object on stdout; log messages go to stderr."""


class PresetOverrides(TrainConfig):
    """Command line that begins with a preset: a field keeps the preset's value unless a flag sets another."""

    config: FilePath | None = None
    """Start from a saved config.json instead of a preset."""

    def as_train_config(self) -> TrainConfig:
        """Return the configuration without the fields that only the command line has."""
        return TrainConfig(**self.model_dump(include=set(TrainConfig.model_fields)))


P = TypeVar("P", bound=PresetOverrides)


def parse_over_preset(model: type[P], argv: Sequence[str], *, verb: str) -> P:
    """Parse `[PRESET] [--flags]`: the flags of `model` over the values of the preset or of a saved configuration.

    Raises:
        UserError: an unknown preset, or anything that `parse` rejects.
    """
    flags = list(argv)
    preset = flags.pop(0) if flags and not flags[0].startswith("-") else None
    if preset is not None and preset not in PRESETS:
        raise UserError(f"unknown verb or preset {preset!r}; {suggest_name(preset, [*VERBS, *PRESETS])}")
    base = _load_base_values(_read_flag(flags, "--config"), preset)
    given = {name for name in HORIZON if has_flag(flags, name)}
    if given:  # a horizon on the command line replaces the preset's, whichever of the three the preset sets
        base |= {name: 0 for name in HORIZON if name not in given}
    return parse(model, flags, prog=f"gpt {verb} {preset or ''}".strip(), default=base)


def parse(model: type[C], argv: Sequence[str], *, prog: str, default: Mapping[str, Any] | None = None) -> C:
    """Parse the flags of `model` over the values in `default` and the model's own defaults.

    Raises:
        UserError: an unknown flag, a missing value, or a value that `model` rejects.
        SystemExit: after `--help`.
    """
    for word in argv:
        if "\0" in word or (not word.isascii() and any("\ud800" <= c <= "\udfff" for c in word)):
            raise UserError(f"{word!r} is not valid text: remove NUL and bytes that are not UTF-8")
    message = io.StringIO()
    try:
        with contextlib.redirect_stderr(message):
            values, unknown = tyro.cli(
                model,
                args=list(argv),
                prog=prog,
                description=_join_lines(model.__doc__),
                default=model.model_construct(**(default or {})),
                return_unknown_args=True,
                registry=_registry,
            )
    except SystemExit as stop:
        if not stop.code:
            raise
        raise UserError(explain_usage_error(message.getvalue(), argv, model, prog)) from None
    if unknown:
        raise UserError(explain_unknown_argument(unknown[0], argv, model, prog))
    try:
        return model.model_validate(values)
    except ValidationError as error:
        raise UserError(explain_validation_error(error, model)) from error


def has_flag(argv: Sequence[str], name: str) -> bool:
    """Return whether a command line sets the field `name` by its flag."""
    flag = f"--{name}".replace("_", "-")
    return any(word.split("=")[0].replace("_", "-") == flag for word in argv)


_registry = ConstructorRegistry()
_VALUE_TYPES = (int, float, str, Path)


@_registry.struct_rule
def _build_section_spec(info: StructTypeInfo) -> StructConstructorSpec | None:
    """Read a section of the configuration as a plain dict, which pydantic checks later with the whole tree."""
    if not (isinstance(info.type, type) and issubclass(info.type, Config)):
        return None
    fields = tuple(
        StructFieldSpec(
            name=field.alias or name,
            type=_mark_positional(kind, name) if POSITIONAL in field.metadata else kind,
            default=_format_members(getattr(info.default, name, tyro.MISSING)),
            helptext=_join_lines(field.description or getattr(get_section(field), "__doc__", None)),
        )
        for name, field in info.type.model_fields.items()
        for kind in [_replace_member_type(field.annotation)]
    )
    return StructConstructorSpec(instantiate=dict, fields=fields)


@_registry.primitive_rule
def _build_value_spec(info: PrimitiveTypeInfo) -> PrimitiveConstructorSpec[Any] | None:
    """Keep a single value as the text that was typed; switches and lists are left to tyro's own rules."""
    alternatives = _get_alternatives(info.type)
    kinds = [kind for kind in alternatives if kind is not NoneType]
    if alternatives == [bool] or not all(kind in _VALUE_TYPES or _get_choices(kind) for kind in kinds):
        return None
    names = [f"{{{','.join(_get_choices(kind))}}}" if _get_choices(kind) else kind.__name__.upper() for kind in kinds]
    return PrimitiveConstructorSpec(
        nargs=1,
        metavar="|".join(names),
        instance_from_str=lambda words: None if words[0] == "none" and NoneType in alternatives else words[0],
        is_instance=lambda _: True,
        str_from_instance=lambda value: ["none" if value is None else str(value)],
    )


def _join_lines(text: str | None) -> str:
    """Return a docstring without its line breaks, so that the help screen can wrap it; paragraphs stay apart."""
    return "\n\n".join(" ".join(paragraph.split()) for paragraph in (text or "").split("\n\n"))


def _mark_positional(annotation: Any, name: str) -> Any:
    metavar = f"[{name.upper()} ...]" if get_origin(annotation) is tuple else name.upper()
    return Annotated[annotation, tyro.conf.Positional, tyro.conf.arg(metavar=metavar)]


def _replace_member_type(annotation: Any) -> Any:
    return tuple[str, ...] if get_origin(annotation) is tuple else annotation


def _format_members(default: Any) -> Any:
    return tuple(str(member) for member in default) if isinstance(default, tuple) else default


def _get_alternatives(annotation: Any) -> list[Any]:
    """Return the types of a union, without their metadata."""
    types = get_args(annotation) if get_origin(annotation) in (Union, UnionType) else [annotation]
    return [get_args(kind)[0] if get_origin(kind) is Annotated else kind for kind in types]


def _get_choices(annotation: Any) -> tuple[str, ...]:
    if annotation is bool:
        return ("true", "false")
    return get_args(annotation) if get_origin(annotation) is Literal else ()


def _load_base_values(saved: str | None, preset: str | None) -> dict[str, Any]:
    """Return the values of `--config`'s file or of the preset, by field name."""
    if saved is None:
        config = PRESETS[preset or "quickstart"]()
    elif preset is not None:
        raise UserError(f"--config {saved} and the preset {preset} both set every value: remove one of them")
    else:
        try:
            config = load_config(Path(expand_home(saved)))
        except UserError as error:
            raise UserError(f"--config {error}") from error
        except ValueError as error:
            raise UserError(f"--config {saved}: {error}") from error
    return {name: getattr(config, name) for name in type(config).model_fields}


def _read_flag(argv: Sequence[str], flag: str) -> str | None:
    """Return the value that a command line gives to `flag`, if any."""
    for index, word in enumerate(argv):
        if word == flag:
            return next((value for value in argv[index + 1 : index + 2] if not value.startswith("--")), None)
        if word.startswith(f"{flag}="):
            return word.removeprefix(f"{flag}=")
    return None
