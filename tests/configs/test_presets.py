import pytest

from gpt.configs.batch_plan import plan_batch
from gpt.configs.presets import PRESETS


@pytest.mark.parametrize("name", PRESETS)
def test_preset_has_a_run_folder_of_its_name_and_a_divisible_batch(name: str) -> None:
    config = PRESETS[name]()
    assert config.run_dir.as_posix() == f"runs/{name}"
    plan_batch(config, world_size=1)


def test_shakespeare_char_is_nanogpts_documented_cpu_setting() -> None:
    config = PRESETS["shakespeare-char"]()
    model = config.model
    assert (model.n_layer, model.n_head, model.n_embd, model.block_size) == (4, 4, 128, 64)
    assert (config.tokens_per_step, config.max_steps, model.dropout) == (12 * 64, 2000, 0)


@pytest.mark.parametrize("name", ["gpt2-124m", "gpt2-355m", "gpt2-774m", "gpt2-1558m"])
def test_gpt2_presets_have_the_sizes_of_their_names(name: str) -> None:
    model = PRESETS[name]().model.model_copy(update={"vocab_size": 50_257})
    assert f"gpt2-{round(model.n_parameters / 1e6)}m" == name
