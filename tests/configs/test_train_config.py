import pytest
from pydantic import ValidationError

from gpt.configs.gpt_config import GPTConfig
from gpt.configs.train_config import TrainConfig


def test_differences_name_what_makes_another_run() -> None:
    ours = TrainConfig()
    other = TrainConfig(seed=1, model=GPTConfig(n_layer=9))
    assert ours.differences(other) == {"seed": (1337, 1), "model.n_layer": (ours.model.n_layer, 9)}


@pytest.mark.parametrize(
    "change",
    [
        {"max_steps": 9},
        {"log": {"interval": 1}},
        {"run_dir": "x"},
        {"device": "cpu"},
        {"micro_batch_size": 1},
        {"micro_batch_size": "auto"},
        {"parallel": {"activation_checkpointing": "block"}},
        {"runtime": {"threads": 3}},
    ],
)
def test_where_and_how_long_a_run_runs_may_change(change: dict[str, object]) -> None:
    assert TrainConfig().differences(TrainConfig.model_validate(change)) == {}


def test_a_configuration_cannot_be_changed_or_extended() -> None:
    with pytest.raises(ValidationError, match="frozen"):
        TrainConfig().seed = 1  # type: ignore[misc]
    with pytest.raises(ValidationError, match="unknown"):
        TrainConfig(unknown=1)  # type: ignore[call-arg]
