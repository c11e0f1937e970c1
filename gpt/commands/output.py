"""Output that several commands share: plain text for people, JSON for programs."""

import json
import math
import sys
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from gpt.utils.terminal import RunConsole


def build_console(*, stderr: bool = False) -> "RunConsole":
    """Return a console that prints text as it is: no markup, no emoji codes, no line breaks of its own."""
    from gpt.utils.terminal import RunConsole

    return RunConsole(stderr=stderr)


def print_json(value: dict[str, Any]) -> None:
    """Print one JSON object on stdout; NaN and infinities, which JSON lacks, become null."""
    sys.stdout.write(json.dumps(_replace_non_finite(value), indent=2, ensure_ascii=False, allow_nan=False) + "\n")


def _replace_non_finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _replace_non_finite(member) for key, member in value.items()}
    if isinstance(value, list | tuple):
        return [_replace_non_finite(member) for member in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
