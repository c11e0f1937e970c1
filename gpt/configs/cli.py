"""argv -> configuration: tyro reads the flags, pydantic checks them, and every error is one line.

tyro hands over the values as text and builds plain dicts (`_registry`), so that pydantic sees the whole tree at
once: its errors then carry the full path of a field, and a saved config.json is checked by the same code.
"""

import contextlib
import io
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, NoReturn, TypeVar, Union, get_args, get_origin

import tyro
from pydantic import BaseModel, ValidationError
from tyro.constructors import (
    ConstructorRegistry,
    PrimitiveConstructorSpec,
    PrimitiveTypeInfo,
    StructConstructorSpec,
    StructFieldSpec,
    StructTypeInfo,
)

from gpt.configs.base import Config
from gpt.configs.explain import explain_error, flags_of, nearest_name
from gpt.configs.load import load_config
from gpt.configs.presets import PRESETS
from gpt.configs.train_config import HORIZON, TrainConfig
from gpt.errors import UserError

C = TypeVar("C", bound=Config)

POSITIONAL = "positional"
"""`Annotated[..., POSITIONAL]` makes a field an argument without a flag."""

VERBS = {
    "train": "train a model, or continue a run",
    "prepare": "turn texts into tokens, once for many runs",
    "sample": "let a trained model continue a text",
    "data-at": "show the documents that a step of a run was trained on",
    "verify": "compare every checkpoint of a run with its digests",
    "verify-resume": "kill and resume a run again and again, and compare every bit with one left in peace",
    "bench": "measure the speed of a training step, or of a whole run",
}


class PresetOverrides(TrainConfig):
    """A command line that begins with a preset: every value is the preset's own unless a flag gives another."""

    config: Path | None = None
    """Start from a saved config.json instead of a preset."""

    def as_train_config(self) -> TrainConfig:
        """Without what only the command line has."""
        return TrainConfig(**self.model_dump(include=set(TrainConfig.model_fields)))


class TrainCommand(PresetOverrides):
    """Train a GPT: every value below is the preset's own."""

    dry_run: bool = False
    """Resolve, check and print the plan; train nothing."""


T = TypeVar("T", bound=PresetOverrides)


def parse_train(argv: Sequence[str]) -> tuple[TrainConfig, bool]:
    """`[PRESET] [--flags]` -> the configuration, and whether only to plan it."""
    command = parse_over_preset(TrainCommand, argv, verb="train")
    return command.as_train_config(), command.dry_run


def parse_over_preset(model: type[T], argv: Sequence[str], *, verb: str) -> T:
    """`[PRESET] [--flags]` -> the flags of `model`, over the values of the preset or of a saved configuration."""
    flags = list(argv)
    preset = flags.pop(0) if flags and not flags[0].startswith("-") else None
    if preset is not None and preset not in PRESETS:
        raise UserError(f"unknown verb or preset {preset!r}; {nearest_name(preset, [*VERBS, *PRESETS])}")
    base = _saved_or_preset(_value_of("--config", flags), preset)
    named = {name for name in HORIZON if is_named(f"--{name}", flags)}
    if named:  # a horizon on the command line replaces the preset's, whichever of the three that one uses
        base |= {name: 0 for name in HORIZON if name not in named}
    return parse(model, flags, prog=f"gpt {verb} {preset or ''}".strip(), default=base)


def parse(model: type[C], argv: Sequence[str], *, prog: str, default: Mapping[str, Any] | None = None) -> C:
    """The flags of `model`, over the values in `default` and the model's own.

    Raises:
        UserError: an unknown flag, a missing value, or a value that `model` refuses.
        SystemExit: after `--help`.
    """
    for word in argv:
        if "\0" in word or (not word.isascii() and any("\ud800" <= c <= "\udfff" for c in word)):
            raise UserError(f"{word!r} is not valid text")
    said = io.StringIO()
    try:
        with contextlib.redirect_stderr(said):
            values, unknown = tyro.cli(
                model,
                args=list(argv),
                prog=prog,
                default=model.model_construct(**(default or {})),
                return_unknown_args=True,
                registry=_registry,
            )
    except SystemExit as stop:
        if not stop.code:
            raise
        _refuse(said.getvalue(), argv, model, prog)
    if unknown:
        _refuse_unknown(unknown[0], argv, model, prog)
    try:
        return model.model_validate(values)
    except ValidationError as error:
        raise UserError(explain_error(error, model)) from error


_registry = ConstructorRegistry()


@_registry.struct_rule
def _section(info: StructTypeInfo) -> StructConstructorSpec | None:
    """A section of the configuration becomes a plain dict: pydantic checks the whole tree later."""
    if not (isinstance(info.type, type) and issubclass(info.type, BaseModel)):
        return None
    fields = tuple(
        StructFieldSpec(
            name=field.alias or name,
            type=_positional(kind) if POSITIONAL in field.metadata else kind,
            default=_members_as_texts(getattr(info.default, name, tyro.MISSING)),
            helptext=field.description,
        )
        for name, field in info.type.model_fields.items()
        for kind in [_as_texts(field.annotation)]
    )
    return StructConstructorSpec(instantiate=dict, fields=fields)


@_registry.primitive_rule
def _text(info: PrimitiveTypeInfo) -> PrimitiveConstructorSpec[Any] | None:
    """A single value stays the text that was typed; switches and lists keep tyro's own reading."""
    alternatives = _alternatives(info.type)
    kinds = [kind for kind in alternatives if kind is not NoneType]
    if not all(kind in (int, float, str, Path) or _choices(kind) for kind in kinds):
        return None
    choices = ["{" + ",".join(_choices(kind)) + "}" if _choices(kind) else kind.__name__.upper() for kind in kinds]
    return PrimitiveConstructorSpec(
        nargs=1,
        metavar="|".join(choices),
        instance_from_str=lambda words: None if words[0] == "none" and NoneType in alternatives else words[0],
        is_instance=lambda _: True,
        str_from_instance=lambda value: ["none" if value is None else str(value)],
    )


def _as_texts(annotation: Any) -> Any:
    """A list of anything is read as a list of texts."""
    return tuple[str, ...] if get_origin(annotation) is tuple else annotation


def _members_as_texts(default: Any) -> Any:
    """So its default is one too."""
    return tuple(str(member) for member in default) if isinstance(default, tuple) else default


def _positional(annotation: Any) -> Any:
    return Annotated[annotation, tyro.conf.Positional]


def _alternatives(annotation: Any) -> list[Any]:
    """The types of a union, without what they are annotated with."""
    types = get_args(annotation) if get_origin(annotation) in (Union, UnionType) else [annotation]
    return [get_args(kind)[0] if get_origin(kind) is Annotated else kind for kind in types]


def _choices(annotation: Any) -> tuple[str, ...]:
    return get_args(annotation) if get_origin(annotation) is Literal else ()


def _saved_or_preset(saved: str | None, preset: str | None) -> dict[str, Any]:
    if saved is None:
        config = PRESETS[preset or "quickstart"]()
    elif preset is not None:
        raise UserError(f"--config {saved} and the preset {preset} both give every value: leave one out")
    else:
        try:
            config = load_config(Path(saved))
        except UserError as error:
            raise UserError(f"--config {error}") from error
    return {name: getattr(config, name) for name in type(config).model_fields}


def is_named(flag: str, argv: Sequence[str]) -> bool:
    """Whether a command line gives a value to `--flag`."""
    return any(word.split("=")[0].replace("_", "-") == flag.replace("_", "-") for word in argv)


def _value_of(flag: str, argv: Sequence[str]) -> str | None:
    for index, word in enumerate(argv):
        if word == flag:
            return next((value for value in argv[index + 1 : index + 2] if not value.startswith("--")), None)
        if word.startswith(f"{flag}="):
            return word.removeprefix(f"{flag}=")
    return None


def _refuse(box: str, argv: Sequence[str], model: type[Config], prog: str) -> NoReturn:
    """What tyro refuses by itself: a flag without its value, which its message names, or a missing argument."""
    known = {*flags_of(model), "--help"}
    for word in argv:
        if word.startswith("--") and word.split("=")[0].replace("_", "-") not in known:
            _refuse_unknown(word, argv, model, prog)
    flag = re.search(r"Missing value for argument\W+(--[a-z][\w.-]*)", box)
    if flag:
        raise UserError(f"{flag[1]} needs a value")
    required = " ".join(name.upper() for name, field in model.model_fields.items() if field.is_required())
    raise UserError(f"usage: {prog} {required} [--flags]; see {prog} --help")


def _refuse_unknown(word: str, argv: Sequence[str], model: type[Config], prog: str) -> NoReturn:
    flags = flags_of(model)
    before = argv[argv.index(word) - 1] if word in argv[1:] else ""
    joined = next((given.removesuffix(f"={word}") for given in argv if given.endswith(f"={word}")), "")
    for switch in (before.replace("_", "-"), joined.replace("_", "-")):
        off = re.sub(r"([a-z-]+)$", r"no-\1", switch.removeprefix("--"))
        if switch and f"--{off}" in flags:
            raise UserError(f"{switch} takes no value: it is {switch} or --{off}")
    if not word.startswith("-"):
        hint = f"; a preset comes first: {' '.join(prog.split()[:2])} {word}" if word in PRESETS else ""
        raise UserError(f"unexpected argument {word!r}{hint}; see {prog} --help")
    flag = word.split("=")[0].replace("_", "-")
    raise UserError(f"unknown flag {flag}; {nearest_name(flag, flags)}")
