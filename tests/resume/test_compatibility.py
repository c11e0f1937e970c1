import pytest

from gpt.configs.resume_rule import FORBIDDEN, NEEDS_FLAG, SAFE, SAFE_IF_LR_UNCHANGED, ResumeRule, resume_rules
from gpt.configs.train_config import TrainConfig
from gpt.errors import UserError
from gpt.resume.compatibility import differences, leaves, require_allowed


def changed(change: dict[str, object], **before: object) -> dict[str, ResumeRule]:
    then, now = TrainConfig.model_validate(before), TrainConfig.model_validate(before | change)
    return {difference.name: difference.rule for difference in differences(then, now)}


def test_every_saved_field_has_a_rule_and_nothing_else() -> None:
    assert leaves(TrainConfig().model_dump()).keys() == resume_rules(TrainConfig).keys()


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
def test_a_change_has_its_class(change: dict[str, object], expected: dict[str, ResumeRule]) -> None:
    assert changed(change) == expected


@pytest.mark.parametrize("then", [0.0, 0.1])
@pytest.mark.parametrize("now", [0.0, 0.1])
def test_another_cut_of_the_batch_matters_to_dropout_alone(then: float, now: float) -> None:
    found = changed({"micro_batch_size": 8, "model": {"dropout": now}}, model={"dropout": then})
    assert found["micro_batch_size"] is (NEEDS_FLAG if then or now else SAFE)


def test_an_error_names_every_field_and_the_flag_that_allows_it() -> None:
    then = TrainConfig()
    lr = then.lr.model_copy(update={"max_lr": 0.5})
    now = then.model_copy(update={"seed": 1, "lr": lr, "grad_clip": 2.0, "max_steps": 9, "device": "cpu"})
    with pytest.raises(UserError) as error:
        require_allowed(differences(then, now), "--run-dir x", with_changes=False)
    assert str(error.value) == (
        "--run-dir x holds a run of another configuration: seed is 1337 there and 1 here, "
        "grad_clip is 1.0 there and 2.0 here, lr.max_lr is 0.002 there and 0.5 here "
        "(--resume-with-changes allows that); take the same values or another --run-dir"
    )
    with pytest.raises(UserError, match=r"configuration: seed is 1337 there and 1 here; take the same values or anoth"):
        require_allowed(differences(then, now), "--run-dir x", with_changes=True)


def test_what_the_flag_allows_is_asked_for_and_then_goes_through() -> None:
    then = TrainConfig()
    found = differences(then, then.model_copy(update={"grad_clip": 2.0}))
    with pytest.raises(UserError, match=r"take the same values or add --resume-with-changes$"):
        require_allowed(found, "--run-dir x", with_changes=False)
    require_allowed(found, "--run-dir x", with_changes=True)
    assert [str(difference) for difference in found] == ["grad_clip 1.0 -> 2.0 (needs --resume-with-changes)"]
