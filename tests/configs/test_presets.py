import json
from pathlib import Path

import pytest

from gpt.configs.batch_plan import plan_batch
from gpt.configs.presets import PRESETS
from gpt.configs.run_plan import resolve_compile
from gpt.resume.compatibility import flatten

RELEASED = json.loads(Path(__file__).with_name("presets.json").read_text(encoding="utf-8"))
"""Values of every preset but quickstart as released, with the model's derived sizes."""


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


@pytest.mark.parametrize("name", [name for name in PRESETS if name != "quickstart"])
def test_preset_keeps_its_released_values_whatever_the_defaults_are(name: str) -> None:
    config = PRESETS[name]().on_device("cpu")
    values = flatten(config.model_copy(update={"model": config.model.resolve()}).model_dump(mode="json"))
    released = flatten(RELEASED[name])
    assert {field: values[field] for field in released} == released


@pytest.mark.parametrize(
    ("name", "n_parameters"), [("llama-30m", 29_938_560), ("llama-124m", 123_587_328), ("qwen3-0.6b", 596_049_920)]
)
def test_presets_of_other_families_have_the_parameters_of_their_names(name: str, n_parameters: int) -> None:
    """Count a tied head once, as the released Qwen3-0.6B does."""
    assert PRESETS[name]().model.n_parameters == n_parameters


@pytest.mark.parametrize("name", ["gpt2-124m", "gpt2-355m", "gpt2-774m", "gpt2-1558m"])
def test_gpt2_presets_leave_micro_batch_and_compile_to_a_gpu(name: str) -> None:
    config = PRESETS[name]()
    assert (resolve_compile(config, "cuda"), resolve_compile(config, "cpu")) == (True, False)
    assert config.on_device("cuda").micro_batch_size == "auto"
    assert config.on_device("mps").micro_batch_size == 4
    assert config.model_copy(update={"micro_batch_size": 8}).on_device("cuda").micro_batch_size == 8
