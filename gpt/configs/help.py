"""The short help of the commands that have every field of a run: the flags that people need first."""

import shutil
import textwrap
from collections.abc import Iterator
from typing import Any

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from gpt.configs.fields import (
    format_default,
    format_flag,
    format_off_flag,
    format_type,
    is_switch,
    list_flags,
    walk_fields,
)
from gpt.configs.presets import PRESETS
from gpt.configs.train_config import TrainConfig

COMMON_FIELDS = {
    "run": ("run_dir", "max_steps", "epochs", "seed", "init_from", "resume_with_changes"),
    "data": ("data.source", "data.tokenizer"),
    "model": ("model.n_layer", "model.n_head", "model.n_embd", "model.block_size"),
    "optimization": ("tokens_per_step", "micro_batch_size", "lr.max_lr"),
    "machine": ("device", "dtype", "compile"),
    "evaluation and checkpoints": ("eval.interval", "checkpoint.interval"),
}
"""Heading -> the fields below it; twenty in all."""
MAX_WIDTH = 100
INDENT = 8


def format_short_help(model: type[BaseModel], values: BaseModel, verb: str) -> str:
    """Return the short help of a command.

    Args:
        model: fields of the command.
        values: defaults, which the preset sets.
        verb: verb of the command.
    """
    fields = dict(walk_fields(model))
    own = [path for path in fields if path.partition(".")[0] not in TrainConfig.model_fields]
    width = min(MAX_WIDTH, shutil.get_terminal_size().columns)
    lines = [f"usage: gpt {verb} [PRESET] [--flags]", ""]
    for paragraph in (model.__doc__ or "").split("\n\n"):
        lines += [*_wrap(paragraph, width), ""]
    lines += ["PRESET is the first word (default: quickstart):"]
    lines += _wrap(", ".join(PRESETS), width, indent=2)
    for heading, paths in {f"gpt {verb}": own, **COMMON_FIELDS}.items():
        lines += ["", f"{heading}:"]
        for path in paths:
            lines += _format_field(path, fields[path], _read_default(values, path), width)
    lines += [
        "",
        f"gpt {verb} --help-all lists all {len(list_flags(model))} flags; docs/configuration.md has them, too.",
    ]
    return "\n".join(lines)


def _format_field(path: str, field: FieldInfo, default: Any, width: int) -> Iterator[str]:
    value = "" if field.annotation is bool else f" {format_type(field.annotation)}"
    yield f"  {format_flag(path)}{value}" + (f", {format_off_flag(path)}" if is_switch(field) else "")
    yield from _wrap(f"{field.description or ''} (default: {format_default(default)})", width, indent=INDENT)


def _wrap(text: str, width: int, indent: int = 0) -> list[str]:
    return textwrap.wrap(
        " ".join(text.split()),
        width,
        initial_indent=" " * indent,
        subsequent_indent=" " * indent,
        break_on_hyphens=False,
        break_long_words=False,
    )


def _read_default(values: BaseModel, path: str) -> Any:
    """Return the value of a field, given by its alias where it has one."""
    value: Any = values
    for part in path.split("."):
        names = {field.alias or name: name for name, field in type(value).model_fields.items()}
        value = getattr(value, names[part])
    return value
