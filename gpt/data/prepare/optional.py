"""Libraries that only some sources need."""

import importlib
from typing import Any

from gpt.errors import UserError


def import_extra(module: str, name: str, place: str) -> Any:
    """Import a library that only some sources need.

    Raises:
        UserError: it is not installed; names the extra that installs it.
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise UserError(f"{place}: needs {module}; pip install 'gpt-training-pipeline[{name}]'") from error
