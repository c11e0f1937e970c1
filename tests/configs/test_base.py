import json
import math

import pytest

from gpt.configs.gpt_config import GPTConfig
from gpt.configs.load import load_config
from gpt.configs.presets import PRESETS
from gpt.configs.train_config import TrainConfig
from gpt.errors import UserError

DEBUG = PRESETS["debug"]()


def test_copy_with_other_values_keeps_the_rest() -> None:
    changed = DEBUG.with_(max_steps=10, **{"model.n_layer": 3, "data.source": "a"})
    assert isinstance(changed, TrainConfig)
    assert (changed.max_steps, changed.model.n_layer, changed.data.source) == (10, 3, ("a",))
    assert changed.with_(max_steps=20, **{"model.n_layer": 2, "data.source": "stdlib"}) == DEBUG
    assert DEBUG.with_() == DEBUG
    assert DEBUG.max_steps == 20


def test_section_is_given_as_dict_of_changes_or_as_a_whole() -> None:
    assert DEBUG.with_(model={"n_layer": 3}).model == DEBUG.model.with_(n_layer=3)
    assert DEBUG.with_(model=GPTConfig(n_layer=5)).model == GPTConfig(n_layer=5)
    changed = DEBUG.with_(model=GPTConfig(n_layer=5), **{"model.n_head": 4})
    assert changed.model == GPTConfig(n_layer=5, n_head=4)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"max_stepz": 10}, "unknown field max_stepz; did you mean max_steps?"),
        ({"learning_rate": 1e-3}, "unknown field learning_rate; did you mean lr.max_lr?"),
        ({"model.n_layr": 3}, "unknown field model.n_layr; did you mean model.n_layer?"),
        ({"model": {"n_layr": 3}}, "unknown field model.n_layr; did you mean model.n_layer?"),
        ({"max_steps.x": 3}, "unknown field max_steps.x; did you mean max_steps?"),
        ({"model.n_layer": 0}, "model.n_layer 0: must be at least 1 (nearest: 1)"),
        ({"model.n_layer": "10k"}, "model.n_layer 10k: expected a whole number (nearest: 10000)"),
        ({"model.n_head": 3}, "model: n_embd=32 is not divisible by n_head=3 (nearest: 30 or 33); or set head_dim"),
        ({"dtype": "fp16"}, "dtype fp16: did you mean float16? one of auto, float32, bfloat16, float16"),
        ({"max_steps": 0}, "max_steps, max_tokens and epochs are all 0, so the run would never end"),
    ],
)
def test_copy_with_an_unknown_name_or_a_wrong_value_is_refused(changes: dict[str, object], message: str) -> None:
    with pytest.raises(UserError) as error:
        DEBUG.with_(**changes)
    assert str(error.value).startswith(message)


def test_zero_has_no_sign(tmp_path) -> None:
    path = tmp_path / "config.json"
    path.write_text(json.dumps({"grad_clip": -0.0, "data": {"val_fraction": -0.0}}))
    for value in (
        load_config(path).grad_clip,
        load_config(path).data.val_fraction,
        DEBUG.with_(grad_clip=-0.0).grad_clip,
    ):
        assert math.copysign(1, value) == 1
