"""argv -> configuration: tyro reads the flags, pydantic checks them, and every error is one line.

tyro hands over the values as text and builds plain dicts (`_registry`), so that pydantic sees the whole tree at
once: its errors then carry the full path of a field, and a saved config.json is checked by the same code.
"""

import contextlib
import difflib
import io
import json
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


class OverPreset(TrainConfig):
    """A command line that begins with a preset: every value is the preset's own unless a flag gives another."""

    config: Path | None = None
    """Start from a saved config.json instead of a preset."""

    def as_train_config(self) -> TrainConfig:
        """Without what only the command line has."""
        return TrainConfig(**self.model_dump(include=set(TrainConfig.model_fields)))


class TrainCommand(OverPreset):
    """Train a GPT: every value below is the preset's own."""

    dry_run: bool = False
    """Resolve, check and print the plan; train nothing."""


T = TypeVar("T", bound=OverPreset)


def parse_train(argv: Sequence[str]) -> tuple[TrainConfig, bool]:
    """`[PRESET] [--flags]` -> the configuration, and whether only to plan it."""
    command = parse_over_preset(TrainCommand, argv, verb="train")
    return command.as_train_config(), command.dry_run


def parse_over_preset(model: type[T], argv: Sequence[str], *, verb: str) -> T:
    """`[PRESET] [--flags]` -> the flags of `model`, over the values of the preset or of a saved configuration."""
    flags = list(argv)
    preset = flags.pop(0) if flags and not flags[0].startswith("-") else None
    if preset is not None and preset not in PRESETS:
        raise UserError(f"unknown verb or preset {preset!r}; {_nearest(preset, [*VERBS, *PRESETS])}")
    base = _saved_or_preset(_value_of("--config", flags), preset)
    named = {name for name in HORIZON if is_named(f"--{name}", flags)}
    if named:  # a horizon on the command line replaces the preset's, whichever of the three that one uses
        base |= {name: 0 for name in HORIZON if name not in named}
    return parse(model, flags, prog=f"gpt {verb} {preset or ''}".strip(), default=base)


def load_config(path: Path) -> TrainConfig:
    """A `config.json` that a run has saved."""
    try:
        saved = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}; a run's folder holds its config.json") from error
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: not valid JSON: {error}; name another config.json") from error
    if not isinstance(saved, dict):
        raise UserError(f"{path}: not a JSON object; name another config.json")
    try:
        return TrainConfig.model_validate(saved)
    except ValidationError as error:
        raise UserError(f"{path}: {_explain(error, TrainConfig, as_flag=False)}") from error


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
        raise UserError(_explain(error, model)) from error


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
    known = {*_flags(model), "--help"}
    for word in argv:
        if word.startswith("--") and word.split("=")[0].replace("_", "-") not in known:
            _refuse_unknown(word, argv, model, prog)
    flag = re.search(r"Missing value for argument\W+(--[a-z][\w.-]*)", box)
    if flag:
        raise UserError(f"{flag[1]} needs a value")
    required = " ".join(name.upper() for name, field in model.model_fields.items() if field.is_required())
    raise UserError(f"usage: {prog} {required} [--flags]; see {prog} --help")


def _refuse_unknown(word: str, argv: Sequence[str], model: type[Config], prog: str) -> NoReturn:
    flags = _flags(model)
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
    raise UserError(f"unknown flag {flag}; {_nearest(flag, flags)}")


def _flags(model: type[BaseModel], prefix: str = "--") -> list[str]:
    flags: list[str] = []
    for name, field in model.model_fields.items():
        flag = prefix + (field.alias or name).replace("_", "-")
        kind = field.annotation
        if isinstance(kind, type) and issubclass(kind, BaseModel):
            flags += _flags(kind, f"{flag}.")
        elif kind is bool:
            flags += [flag, f"{prefix}no-{name.replace('_', '-')}"]
        else:
            flags.append(flag)
    return flags


def _nearest(word: str, known: Sequence[str] | Mapping[str, Any]) -> str:
    names = list(known)
    close = difflib.get_close_matches(word, names, n=1, cutoff=0.5)
    if not close:  # `--lr` is far from every flag by spelling, but is the tail or the section of one
        close = [name for name in names if word.strip("-") in re.split(r"[.-]+", name)][:1]
    if close:
        return f"did you mean {close[0]}?"
    return f"one of {', '.join(names)}" if len(names) < 20 else "gpt train --help lists them all"


def _explain(error: ValidationError, model: type[Config], *, as_flag: bool = True) -> str:
    """The first of pydantic's errors as one line: where, which value, what it should be."""
    first, *others = error.errors(include_url=False)
    path = _field_path(first["loc"], model)
    place = "--" + ".".join(path).replace("_", "-") if as_flag else ".".join(path)
    value, context = first["input"], first.get("ctx", {})
    if first["type"] == "value_error":  # a model's own check: its message names its fields and values
        section = "" if not path else f"{'.'.join(path)}: " if isinstance(value, dict) else f"{place} {value!r}: "
        return f"{section}{context['error']}"
    if first["type"] == "extra_forbidden":
        known = [flag[2:].replace("-", "_") for flag in _flags(model)]
        return f"unknown key {place}; {_nearest(place, known)}"
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
