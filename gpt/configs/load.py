"""config.json -> TrainConfig."""

import json
from pathlib import Path

from pydantic import ValidationError

from gpt.configs.explain import explain_validation_error
from gpt.configs.train_config import TrainConfig
from gpt.errors import UserError


def load_config(path: Path) -> TrainConfig:
    """Read a `config.json` that a run has saved.

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
        return TrainConfig.model_validate(saved)
    except ValidationError as error:
        raise UserError(f"{path}: {explain_validation_error(error, TrainConfig, as_flag=False)}") from error
