"""argv -> configuration: tyro reads the flags, pydantic checks them, and every error is one line.

tyro hands over the values as text and builds plain dicts (`_registry`), so that pydantic checks the whole tree at
once: its errors then carry the full path of a field, and the same code checks a saved config.json.
"""

import contextlib
import io
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import NoneType
from typing import Annotated, Any, TypeVar

import tyro
from pydantic import Field, ValidationError
from pydantic.fields import FieldInfo
from tyro.constructors import (
    ConstructorRegistry,
    PrimitiveConstructorSpec,
    PrimitiveTypeInfo,
    StructConstructorSpec,
    StructFieldSpec,
    StructTypeInfo,
)

from gpt.configs.arguments import FULL_HELP, SHORT_HELP, explain_unknown_word, has_flag, looks_like_flag, read_words
from gpt.configs.base import Config, FilePath
from gpt.configs.explain import explain_validation_error
from gpt.configs.fields import POSITIONAL, format_type, get_alternatives, get_choices, get_section, is_list
from gpt.configs.gpt_config import GPTConfig
from gpt.configs.help import format_short_help
from gpt.configs.load import load_config
from gpt.configs.presets import PRESETS
from gpt.configs.train_config import HORIZON, TrainConfig
from gpt.configs.user_folders import expand_home
from gpt.errors import UserError

C = TypeVar("C", bound=Config)


DescribeWeights = Callable[[str], tuple[GPTConfig, str] | None]
"""Returns architecture and tokenizer of the weights that --init-from names; None if there are none."""


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


def parse_over_preset(
    model: type[P], argv: Sequence[str], *, verb: str, describe_weights: DescribeWeights | None = None
) -> P:
    """Parse `[PRESET] [--flags]`: the flags of `model` over the values of the preset or of a saved configuration.

    Args:
        model: the command.
        argv: command line after the verb.
        verb: the verb.
        describe_weights: finds architecture and tokenizer of --init-from, which replace those of the preset.

    Raises:
        UserError: an unknown preset, or anything that `parse` rejects.
    """
    words = list(argv)
    preset = words.pop(0) if words and not looks_like_flag(words[0]) else None
    if preset is not None and preset not in PRESETS:
        raise UserError(explain_unknown_word(preset))
    prog = f"gpt {verb} {preset or ''}".strip()
    words = read_words(words, model, prog)
    base = _load_base_values(_read_flag(words, "--config"), preset)
    init_from = _read_flag(words, "--init-from")
    if describe_weights is not None and init_from not in (None, "", "none"):
        base |= _adopt_weights(base, describe_weights(expand_home(init_from)))
    if not {*SHORT_HELP}.isdisjoint(words):
        print(format_short_help(model, model.model_construct(**base), verb))
        raise SystemExit(0)
    given = {name for name in HORIZON if has_flag(words, name)}
    if given:  # a horizon on the command line replaces the preset's, whichever of the three the preset sets
        base |= {name: 0 for name in HORIZON if name not in given}
    return _parse_words(model, words, prog, base)


def parse(model: type[C], argv: Sequence[str], *, prog: str) -> C:
    """Parse the flags of `model` over its defaults.

    Raises:
        UserError: an unknown flag, a missing value, or a value that `model` rejects.
        SystemExit: after `--help`.
    """
    return _parse_words(model, read_words(argv, model, prog), prog, {})


def _parse_words(model: type[C], words: list[str], prog: str, base: Mapping[str, Any]) -> C:
    """Parse words that `read_words` has checked, over the values in `base` and the model's own defaults."""
    if not {*SHORT_HELP, FULL_HELP}.isdisjoint(words):
        words = ["--help"]
    message = io.StringIO()
    try:
        with contextlib.redirect_stderr(message):
            values, unknown = tyro.cli(
                model,
                args=words,
                prog=prog,
                description=_join_lines(model.__doc__),
                default=model.model_construct(**base),
                return_unknown_args=True,
                registry=_registry,
            )
    except SystemExit as stop:
        if not stop.code:
            raise
        raise UserError(_format_usage(model, prog)) from None
    if unknown:
        raise UserError(f"unexpected argument {unknown[0]!r}; see {prog} --help")
    try:
        return model.model_validate(values)
    except ValidationError as error:
        raise UserError(explain_validation_error(error, model)) from error


_registry = ConstructorRegistry()
_VALUE_TYPES = (int, float, str, Path)


@_registry.struct_rule
def _build_section_spec(info: StructTypeInfo) -> StructConstructorSpec | None:
    """Read a section of the configuration as a plain dict, which pydantic checks later with the whole tree."""
    if not (isinstance(info.type, type) and issubclass(info.type, Config)):
        return None
    fields = tuple(_build_field_spec(name, field, info.default) for name, field in info.type.model_fields.items())
    return StructConstructorSpec(instantiate=dict, fields=fields)


def _build_field_spec(name: str, field: FieldInfo, defaults: Any) -> StructFieldSpec:
    kind: Any = tuple[str, ...] if is_list(field.annotation) else field.annotation
    default = getattr(defaults, name, tyro.MISSING)
    return StructFieldSpec(
        name=field.alias or name,
        type=_mark_positional(kind, name) if POSITIONAL in field.metadata else kind,
        default=tuple(map(str, default)) if isinstance(default, tuple) else default,
        helptext=_join_lines(field.description or getattr(get_section(field), "__doc__", None)),
    )


@_registry.primitive_rule
def _build_value_spec(info: PrimitiveTypeInfo) -> PrimitiveConstructorSpec[Any] | None:
    """Keep a single value as the text that was typed; switches and lists are left to tyro's own rules."""
    alternatives = get_alternatives(info.type)
    kinds = [kind for kind in alternatives if kind is not NoneType]
    if alternatives == [bool] or not all(kind in _VALUE_TYPES or get_choices(kind) for kind in kinds):
        return None
    return PrimitiveConstructorSpec(
        nargs=1,
        metavar=format_type(info.type),
        instance_from_str=lambda words: None if words[0] == "none" and NoneType in alternatives else words[0],
        is_instance=lambda _: True,
        str_from_instance=lambda value: ["none" if value is None else str(value)],
    )


def _join_lines(text: str | None) -> str:
    """Return a docstring without its line breaks, so that the help screen can wrap it; paragraphs stay apart."""
    return "\n\n".join(" ".join(paragraph.split()) for paragraph in (text or "").split("\n\n"))


def _mark_positional(annotation: Any, name: str) -> Any:
    metavar = f"[{name.upper()} ...]" if is_list(annotation) else name.upper()
    return Annotated[annotation, tyro.conf.Positional, tyro.conf.arg(metavar=metavar)]


def _format_usage(model: type[Config], prog: str) -> str:
    """Return one line for a command line that lacks an argument."""
    required = [
        name.upper() if POSITIONAL in field.metadata else f"--{name} {name.upper()}"
        for name, field in model.model_fields.items()
        if field.is_required()
    ]
    return f"usage: {prog} {' '.join(required)} [--flags]; see {prog} --help"


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


def _adopt_weights(base: Mapping[str, Any], weights: tuple[GPTConfig, str] | None) -> dict[str, Any]:
    """Return the sections that change if a run starts from weights: architecture, except for dropout, and tokenizer."""
    if weights is None:
        return {}
    model, tokenizer = weights
    return {
        "model": model.model_copy(update={"dropout": base["model"].dropout}),
        "data": base["data"].model_copy(update={"tokenizer": tokenizer}),
    }


def _read_flag(words: Sequence[str], flag: str) -> str | None:
    """Return the value that a command line gives to `flag`, if any; of several the last, as tyro does."""
    given = [word.removeprefix(f"{flag}=") for word in words if word.startswith(f"{flag}=")]
    return given[-1] if given else None
