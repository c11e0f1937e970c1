from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from gpt.configs.gpt_config import GPTConfig
from gpt.configs.presets import PRESETS
from gpt.configs.resume_rule import (
    FORBIDDEN,
    NEEDS_FLAG,
    SAFE,
    SAFE_IF_LR_UNCHANGED,
    SAFE_IF_SAME_CONTENT,
    ResumeRule,
    get_resume_rules,
)
from gpt.configs.run_plan import CONTENT_KEY, CORPUS_KEY, DTYPE_KEY, CorpusFacts, MachineFacts, StreamFacts, resolve
from gpt.configs.train_config import TrainConfig
from gpt.errors import UserError
from gpt.resume.compatibility import (
    adopt_corpus,
    adopt_dtype,
    find_differences,
    flatten,
    require_allowed,
    require_resumable,
)


def configure(*changes: dict[str, Any]) -> TrainConfig:
    """Return the default configuration with `changes`, in which a dict replaces the fields of a section."""
    values = TrainConfig().model_dump()
    for change in changes:
        for name, value in change.items():
            values[name] = values[name] | value if isinstance(value, dict) else value
    return TrainConfig.model_validate(values)


def find_rules(change: dict[str, Any], **before: Any) -> dict[str, ResumeRule]:
    saved, current = configure(before), configure(before, change)
    return {difference.name: difference.rule for difference in find_differences(saved, current)}


def test_every_saved_field_has_a_rule_and_nothing_else() -> None:
    assert flatten(TrainConfig().model_dump()).keys() == get_resume_rules(TrainConfig).keys()


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({}, {}),
        ({"log": {"interval": 1}}, {"log.interval": SAFE}),
        ({"runtime": {"threads": 3}, "device": "cpu"}, {"runtime.threads": SAFE, "device": SAFE}),
        ({"parallel": {"activation_checkpointing": "block"}}, {"parallel.activation_checkpointing": SAFE}),
        ({"micro_batch_size": 1}, {"micro_batch_size": SAFE}),
        ({"micro_batch_size": "auto"}, {"micro_batch_size": SAFE}),
        ({"max_steps": 9}, {"max_steps": SAFE_IF_LR_UNCHANGED}),
        ({"lr": {"max_lr": 0.5}}, {"lr.max_lr": NEEDS_FLAG}),
        ({"optimizer": {"beta2": 0.5}}, {"optimizer.beta2": NEEDS_FLAG}),
        ({"seed": 1, "model": {"n_layer": 9}}, {"seed": FORBIDDEN, "model.n_layer": FORBIDDEN}),
        ({"data": {"tokenizer": "byte"}}, {"data.tokenizer": FORBIDDEN}),
    ],
)
def test_change_gets_the_rule_of_its_field(change: dict[str, object], expected: dict[str, ResumeRule]) -> None:
    assert find_rules(change) == expected


@pytest.mark.parametrize("saved", [0.0, 0.1])
@pytest.mark.parametrize("current", [0.0, 0.1])
def test_micro_batch_size_needs_the_flag_only_with_dropout(saved: float, current: float) -> None:
    rules = find_rules({"micro_batch_size": 8, "model": {"dropout": current}}, model={"dropout": saved})
    assert rules["micro_batch_size"] is (NEEDS_FLAG if saved or current else SAFE)


@pytest.mark.parametrize("dropout", [0.0, 0.1])
@pytest.mark.parametrize("change", [{"compile": "on"}, {"device": "cuda"}])
def test_compiler_and_device_need_the_flag_only_with_dropout(change: dict[str, object], dropout: float) -> None:
    # Each of them draws dropout masks of its own.
    rules = find_rules(change, model={"dropout": dropout}, device="cpu")
    assert rules == dict.fromkeys(change, NEEDS_FLAG if dropout else SAFE)


@pytest.mark.parametrize(
    ("device", "same", "other"),
    [
        ("cpu", {"device": "cpu", "compile": "off"}, {"compile": "on"}),
        ("cuda", {"device": "cuda", "compile": "on"}, {"compile": "off"}),
    ],
)
def test_auto_equals_what_it_stands_for_on_this_machine(
    device: str, same: dict[str, object], other: dict[str, object]
) -> None:
    saved = configure({"model": {"dropout": 0.1}})
    assert saved.device == saved.compile == "auto"
    assert require_resumable(configure({"model": {"dropout": 0.1}}, same), saved, "--run-dir x", device) == ()
    with pytest.raises(UserError, match=r"compile is (on|off) in the run and (on|off) in this command"):
        require_resumable(configure({"model": {"dropout": 0.1}}, other), saved, "--run-dir x", device)


def test_error_names_every_field_and_the_flag_that_allows_it() -> None:
    saved = TrainConfig()
    lr = saved.lr.model_copy(update={"max_lr": 0.5})
    current = saved.model_copy(update={"seed": 1, "lr": lr, "grad_clip": 2.0, "max_steps": 9, "device": "cpu"})
    with pytest.raises(UserError) as error:
        require_allowed(find_differences(saved, current), "--run-dir x", with_changes=False)
    assert str(error.value) == (
        "--run-dir x holds a run of another configuration: seed is 1337 in the run and 1 in this command, "
        "grad_clip is 1.0 in the run and 2.0 in this command, "
        "lr.max_lr is 0.02 in the run and 0.5 in this command "
        "(--resume-with-changes allows this); use the same values or another --run-dir"
    )
    with pytest.raises(
        UserError, match=r"configuration: seed is 1337 in the run and 1 in this command; use the same values or anoth"
    ):
        require_allowed(find_differences(saved, current), "--run-dir x", with_changes=True)


def test_run_of_another_preset_is_one_short_line_with_the_remedy() -> None:
    differences = find_differences(PRESETS["gpt2-124m"](), TrainConfig())
    with pytest.raises(UserError) as error:
        require_allowed(differences, "--run-dir x", with_changes=False)
    message = str(error.value)
    assert message.startswith("--run-dir x holds a run of another configuration: tokens_per_step is 524288 in the run")
    assert message.endswith(
        " more differ; --config with the run's config.json resumes it, another --run-dir starts a new run"
    )
    assert len(message) < 400


def test_flag_is_named_and_then_allows_the_change() -> None:
    saved = TrainConfig()
    differences = find_differences(saved, saved.model_copy(update={"grad_clip": 2.0}))
    with pytest.raises(UserError, match=r"use the same values or add --resume-with-changes$"):
        require_allowed(differences, "--run-dir x", with_changes=False)
    require_allowed(differences, "--run-dir x", with_changes=True)
    assert [str(difference) for difference in differences] == ["grad_clip 1.0 -> 2.0 (needs --resume-with-changes)"]


def test_derived_size_equals_the_same_size_given_as_a_number() -> None:
    derived = TrainConfig(model=GPTConfig())
    size = {"head_dim": 64, "n_kv_head": 4, "intermediate_size": 1024, "norm_eps": 1e-5, "qkv_bias": True}
    given = derived.model_copy(update={"model": derived.model.model_copy(update=size)})
    assert find_differences(derived, given) == ()
    other = derived.model_copy(update={"model": derived.model.model_copy(update={"head_dim": 32})})
    assert [difference.name for difference in find_differences(derived, other)] == ["model.head_dim"]
    wider = derived.model_copy(update={"model": derived.model.model_copy(update={"n_embd": 512})})
    assert [difference.name for difference in find_differences(derived, wider)] == ["model.n_embd"]


@pytest.mark.parametrize("name", ["source", "val_source"])
def test_another_source_is_left_to_the_corpus_digest(name: str) -> None:
    assert find_rules({"data": {name: "b.txt"}}, data={name: "a.txt"}) == {f"data.{name}": SAFE_IF_SAME_CONTENT}


def test_spelling_of_a_path_is_no_difference(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a.txt").touch()
    (tmp_path / "link.txt").symlink_to("a.txt")
    spellings = ("a.txt", "./a.txt", f"{tmp_path}/a.txt", f"../{tmp_path.name}/a.txt", "link.txt", "none/../a.txt")
    for spelling in spellings:
        other = {"init_from": spelling, "data": {"source": [spelling, "stdlib"], "tokenizer": spelling}}
        assert find_rules(other, init_from="a.txt", data={"source": ["a.txt", "stdlib"], "tokenizer": "a.txt"}) == {}
    assert find_rules({"init_from": "b.txt"}, init_from="a.txt") == {"init_from": FORBIDDEN}
    assert find_rules({"data": {"tokenizer": "a.txt"}}) == {"data.tokenizer": SAFE_IF_SAME_CONTENT}


@pytest.mark.parametrize(
    ("saved", "expected"),
    [
        ({CORPUS_KEY: "former", CONTENT_KEY: "tokens"}, "former"),
        ({CORPUS_KEY: "former", CONTENT_KEY: "others"}, "current"),
        ({CORPUS_KEY: "former"}, "current"),
        ({}, "current"),
    ],
)
def test_corpus_of_equal_content_is_the_same(saved: dict[str, str | int], expected: str) -> None:
    corpus = CorpusFacts(257, (StreamFacts("a", 10**6),), sha256="current", content_sha256="tokens")
    plan = resolve(TrainConfig(), MachineFacts("cpu", "", has_bfloat16=False), corpus)
    adopted = adopt_corpus(plan, saved)
    assert adopted.corpus.sha256 == expected
    assert (adopted.order == plan.order) == (expected == "current")
    unknown = replace(plan, corpus=replace(corpus, content_sha256=""))
    assert adopt_corpus(unknown, saved | {CONTENT_KEY: ""}).corpus.sha256 == "current"


@pytest.mark.parametrize(
    ("dtype", "saved", "expected"),
    [("auto", "float32", "float32"), ("auto", "float16", "float16"), ("float16", "float32", "float16")],
)
def test_run_that_auto_trained_in_float32_on_a_gpu_resumes_in_it(dtype: str, saved: str, expected: str) -> None:
    config = TrainConfig.model_validate({"dtype": dtype})
    corpus = CorpusFacts(257, (StreamFacts("a", 10**6),))
    plan = resolve(config, MachineFacts("cuda", "Tesla T4", has_bfloat16=False), corpus)
    adopted = adopt_dtype(config, plan, {DTYPE_KEY: saved})
    assert adopted.dtype == expected
    assert any("is float16" in note for note in adopted.notes) == (dtype == "auto" and expected == "float16")
