import os
from pathlib import Path

import pytest
from pydantic import ValidationError

from gpt.configs.base import get_section
from gpt.configs.gpt_config import GPTConfig
from gpt.configs.load import load_config
from gpt.configs.optimizer_config import OptimizerConfig
from gpt.configs.train_config import TrainConfig


def test_configuration_is_frozen_and_rejects_unknown_fields() -> None:
    with pytest.raises(ValidationError, match="frozen"):
        TrainConfig().seed = 1  # type: ignore[misc]
    with pytest.raises(ValidationError, match="unknown"):
        TrainConfig(unknown=1)  # type: ignore[call-arg]


def test_fields_of_a_single_launch_are_not_saved() -> None:
    saved = TrainConfig(resume_with_changes=True, seed=3).saved_json()
    assert TrainConfig.model_validate_json(saved) == TrainConfig(seed=3).map_paths(os.path.abspath)


@pytest.mark.parametrize(("saved", "loaded"), [("true", "on"), ("false", "off"), ('"auto"', "auto")])
def test_compile_of_a_former_config_json_loads(saved: str, loaded: str, tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    path.write_text(f'{{"compile": {saved}}}', encoding="utf-8")
    assert load_config(path).compile == loaded


def test_recipe_names_no_field_that_its_section_already_has_so_editing_that_section_works() -> None:
    for name, field in TrainConfig.model_fields.items():
        if section := get_section(field):
            recipe, default = getattr(TrainConfig(), name), section()
            repeated = [key for key in recipe.model_fields_set if getattr(recipe, key) == getattr(default, key)]
            assert (name, repeated) == (name, [])


def test_quickstart_has_the_architecture_of_qwen3() -> None:
    model = TrainConfig().model.resolve()
    assert (model.position, model.norm, model.norm_eps, model.mlp, model.qk_norm) == (
        "rotary",
        "rmsnorm",
        1e-6,
        "swiglu",
        True,
    )
    assert not (model.qkv_bias or model.attn_out_bias or model.mlp_bias or model.logit_softcap)


def test_sections_by_themselves_are_gpt2_trained_with_adamw() -> None:
    model = GPTConfig()
    assert (model.position, model.norm, model.mlp, model.bias, model.qk_norm) == (
        "learned",
        "layernorm",
        "gelu",
        True,
        False,
    )
    assert OptimizerConfig().name == "adamw"
