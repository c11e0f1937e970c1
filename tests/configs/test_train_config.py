import os

import pytest
from pydantic import ValidationError

from gpt.configs.train_config import TrainConfig


def test_configuration_is_frozen_and_rejects_unknown_fields() -> None:
    with pytest.raises(ValidationError, match="frozen"):
        TrainConfig().seed = 1  # type: ignore[misc]
    with pytest.raises(ValidationError, match="unknown"):
        TrainConfig(unknown=1)  # type: ignore[call-arg]


def test_fields_of_a_single_launch_are_not_saved() -> None:
    saved = TrainConfig(resume_with_changes=True, seed=3).saved_json()
    assert TrainConfig.model_validate_json(saved) == TrainConfig(seed=3).map_paths(os.path.abspath)
