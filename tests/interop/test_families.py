import pytest

from gpt.configs.gpt_config import GPTConfig
from gpt.configs.presets import PRESETS
from gpt.configs.train_config import TrainConfig
from gpt.errors import UserError
from gpt.interop.families import FAMILIES, find_families, require_family
from tests.interop.families import CHANGES, make_config


@pytest.mark.parametrize("name", CHANGES)
def test_every_family_is_found(name: str) -> None:
    family = require_family(make_config(name))
    assert family.model_type == name.replace(",", " ").split()[0]


def test_the_default_configuration_is_a_qwen_3() -> None:
    assert require_family(TrainConfig().model).architecture == "Qwen3ForCausalLM"


@pytest.mark.parametrize("name", [name for name in PRESETS if name != "speedrun-char"])
def test_every_preset_but_the_speedrun_has_a_class(name: str) -> None:
    assert find_families(PRESETS[name]().model)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"mlp": "relu2", "qk_norm": True, "logit_softcap": 15, "position": "rotary", "norm": "rmsnorm"}
            | {"bias": False},
            "no class of transformers has --model.mlp relu2, --model.logit-softcap 15; "
            "nearest: Qwen3ForCausalLM, with --model.mlp swiglu --model.logit-softcap 0$",
        ),
        ({"n_kv_head": 2}, "has --model.n-kv-head 2; nearest: GPT2LMHeadModel, with --model.n-kv-head 4"),
        ({"qk_norm": True}, "has --model.qk-norm; nearest: GPT2LMHeadModel, with --model.no-qk-norm"),
        ({"head_dim": 20}, "has --model.head-dim 20; nearest: GPT2LMHeadModel, with --model.head-dim 64"),
        ({"sliding_window": 8}, "has --model.sliding-window 8; nearest: GPT2LMHeadModel"),
    ],
)
def test_fields_in_the_way_are_named_with_the_nearest_class(changes: dict[str, object], message: str) -> None:
    with pytest.raises(UserError, match=message):
        require_family(GPTConfig.model_validate(changes))


def test_the_nearest_configuration_has_a_class() -> None:
    config = PRESETS["speedrun-char"]().model.resolve()
    obstacles = min((family.find_obstacles(config) for family in FAMILIES), key=len)
    assert find_families(config.with_(**{item.name: item.nearest for item in obstacles}))
