"""`python -m gpt.configs.reference`: print docs/configuration.md from the configuration models."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from gpt.configs.fields import format_default, format_flag, get_section
from gpt.configs.resume_rule import ResumeRule, get_resume_rule
from gpt.configs.train_config import TrainConfig

INTRODUCTION = """\
# Configuration

This page is printed by `python -m gpt.configs.reference > docs/configuration.md`; a test keeps the two equal.

Each flag below belongs to `gpt train`. A saved `config.json` and `TrainConfig` in Python use the same names, with `_`
for `-`. Defaults are those of the `quickstart` preset; `gpt train PRESET --help` shows another preset's.

The last column says what happens when a run is resumed with another value than it was trained with:

| when resuming | meaning |
| --- | --- |"""

MEANINGS = {
    ResumeRule.SAFE: "accepted",
    ResumeRule.SAFE_IF_LR_UNCHANGED: "accepted if the steps already taken would have had the same learning rates; "
    "else it needs the flag",
    ResumeRule.SAFE_WITHOUT_DROPOUT: "accepted if the model has no dropout; else it needs the flag",
    ResumeRule.SAFE_IF_SAME_CONTENT: "accepted if the corpus and the tokenizer have the same content as before, "
    "wherever they are",
    ResumeRule.NEEDS_FLAG: "accepted with this flag: the run goes on as another experiment",
    ResumeRule.FORBIDDEN: "rejected: start a new run",
}


def format_reference() -> str:
    """Return the Markdown page on every field of the configuration."""
    lines = [INTRODUCTION, *(f"| {rule.value} | {meaning} |" for rule, meaning in MEANINGS.items())]
    defaults = TrainConfig()
    lines += _format_section("The run", "", defaults, "")
    for name, field in TrainConfig.model_fields.items():
        section = get_section(field)
        if section is not None:
            lines += _format_section(f"`{name}`", section.__doc__ or "", getattr(defaults, name), f"{name}.")
    return "\n".join(lines) + "\n"


def _format_section(title: str, description: str, defaults: BaseModel, prefix: str) -> Iterator[str]:
    yield f"\n## {title}\n"
    if description:
        yield f"{' '.join(description.split())}\n"
    yield "| flag | default | meaning | when resuming |"
    yield "| --- | --- | --- | --- |"
    for name, field in type(defaults).model_fields.items():
        if get_section(field) is None:
            choices = _format_choices(field)
            text = " ".join((field.description or "").split())
            cells = [
                f"`{format_flag(prefix + name)}`{choices}",
                f"`{_format_default(getattr(defaults, name))}`",
                text,
                get_resume_rule(field).value,
            ]
            yield "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


def _format_choices(field: FieldInfo) -> str:
    if get_origin(field.annotation) is not Literal:
        return ""
    return " " + ", ".join(f"`{choice}`" for choice in get_args(field.annotation))


def _format_default(value: Any) -> str:
    if isinstance(value, Path) and value.is_absolute():  # data.cache_dir, which differs between machines
        return f"(user cache)/{value.name}"
    return format_default(value)


if __name__ == "__main__":
    print(format_reference(), end="")
