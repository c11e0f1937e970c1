import pytest
from pydantic import ValidationError

from gpt.configs.train_config import TrainConfig


def test_a_configuration_cannot_be_changed_or_extended() -> None:
    with pytest.raises(ValidationError, match="frozen"):
        TrainConfig().seed = 1  # type: ignore[misc]
    with pytest.raises(ValidationError, match="unknown"):
        TrainConfig(unknown=1)  # type: ignore[call-arg]


def test_what_is_said_of_one_start_is_not_saved() -> None:
    saved = TrainConfig(resume_with_changes=True, seed=3).saved_json()
    assert TrainConfig.model_validate_json(saved) == TrainConfig(seed=3)
