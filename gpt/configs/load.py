"""config.json -> TrainConfig."""

import json
import os
from collections.abc import Sequence
from pathlib import Path

from pydantic import ValidationError

from gpt.configs.explain import explain_validation_error
from gpt.configs.train_config import TrainConfig
from gpt.errors import UserError


def load_config(path: Path) -> TrainConfig:
    """Read a `config.json` that a run has saved.

    A relative path in it is looked up in the current folder, then in the folders above the file: former versions saved
    paths as the user typed them.

    Raises:
        UserError: the file is missing, not JSON, or no valid configuration.
    """
    try:
        saved = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}; name a run's config.json") from error
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: not valid JSON: {error}; name another config.json") from error
    if not isinstance(saved, dict):
        raise UserError(f"{path}: not a JSON object; name another config.json")
    try:
        config = TrainConfig.model_validate(saved)
    except ValidationError as error:
        raise UserError(f"{path}: {explain_validation_error(error, TrainConfig, as_flag=False)}") from error
    folders = path.absolute().parents
    return config.map_paths(lambda relative: _find_path(relative, folders))


def _find_path(path: str, folders: Sequence[Path]) -> str:
    """Return a relative path as the first of `folders` makes it exist; as it is if the current folder or none does."""
    if os.path.isabs(path) or Path(path).exists():  # noqa: PTH117 - `path` may end with a slash, which Path drops
        return path
    return next((str(folder / path) for folder in folders if (folder / path).exists()), path)
