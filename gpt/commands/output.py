"""Output that several commands share."""

import json
import math
import sys
from typing import Any


def print_json(value: dict[str, Any]) -> None:
    """Print one JSON object on stdout; NaN and infinities, which JSON lacks, become null."""
    sys.stdout.write(json.dumps(_replace_non_finite(value), indent=2, ensure_ascii=False, allow_nan=False) + "\n")


def _replace_non_finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _replace_non_finite(member) for key, member in value.items()}
    if isinstance(value, list | tuple):
        return [_replace_non_finite(member) for member in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
