from types import FunctionType
from typing import Any

import pytest
import torch
import transformers

from gpt.configs.lr_config import LRConfig
from gpt.utils import custom_scheduler
from gpt.utils.custom_scheduler import build_schedule

STEPS, WARMUP = 40, 8


def multipliers(**settings: Any) -> list[float]:
    lr = LRConfig.model_validate({"max_lr": 1.0, "min_lr": 0.0, "warmup_steps": WARMUP} | settings)
    schedule = build_schedule(lr, STEPS)
    return [schedule(step) for step in range(STEPS)]


def transformers_multipliers(factory: Any, **settings: Any) -> list[float]:
    """Return multipliers of transformers by its own step, which gives the first update an lr of zero."""
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1.0)
    return [factory(optimizer, num_warmup_steps=WARMUP, **settings).lr_lambdas[0](s) for s in range(STEPS + 1)]


@pytest.mark.parametrize(
    ("schedule", "factory"),
    [
        ("cosine", transformers.get_cosine_schedule_with_warmup),
        ("linear", transformers.get_linear_schedule_with_warmup),
    ],
)
def test_decays_equal_transformers(schedule: str, factory: Any) -> None:
    theirs = transformers_multipliers(factory, num_training_steps=STEPS)
    ours = multipliers(schedule=schedule, decay_steps=STEPS - WARMUP)
    assert ours[:WARMUP] == pytest.approx(theirs[1 : WARMUP + 1])  # one step earlier, so that no update is lost
    assert ours[WARMUP:] == pytest.approx(theirs[WARMUP:STEPS])


def test_inverse_sqrt_equals_transformers_one_step_earlier() -> None:
    theirs = transformers_multipliers(transformers.get_inverse_sqrt_schedule)
    assert multipliers(schedule="inverse-sqrt") == pytest.approx(theirs[1:])


def test_wsd_holds_max_lr_then_decays_as_in_transformers() -> None:
    theirs = transformers_multipliers(
        transformers.get_wsd_schedule, num_decay_steps=10, num_training_steps=STEPS, decay_type="linear"
    )
    ours = multipliers(schedule="wsd", decay_steps=10)
    assert ours[:WARMUP] == pytest.approx(theirs[1 : WARMUP + 1])
    assert ours[WARMUP:] == pytest.approx(theirs[WARMUP:STEPS])
    assert ours[WARMUP : STEPS - 10] == [1.0] * (STEPS - 10 - WARMUP)


def test_constant_holds_max_lr() -> None:
    assert multipliers(schedule="constant")[WARMUP:] == [1.0] * (STEPS - WARMUP)


@pytest.mark.parametrize("schedule", ["cosine", "linear", "wsd", "inverse-sqrt", "constant"])
def test_warmup_starts_at_one_step_of_it_and_reaches_max_lr(schedule: str) -> None:
    decay = {} if schedule in ("inverse-sqrt", "constant") else {"decay_steps": 20}
    assert multipliers(schedule=schedule, **decay)[0] == pytest.approx(1 / WARMUP)
    assert multipliers(schedule=schedule, **decay)[WARMUP - 1] == 1.0


@pytest.mark.parametrize("schedule", ["cosine", "linear"])
def test_a_decay_ends_at_min_lr_and_stays_there(schedule: str) -> None:
    ours = multipliers(schedule=schedule, decay_steps=10, min_lr=0.25)
    assert ours[WARMUP + 10 :] == pytest.approx([0.25] * (STEPS - WARMUP - 10))
    assert min(ours[WARMUP:]) >= 0.25


def test_without_warmup_the_first_update_has_max_lr() -> None:
    assert multipliers(schedule="cosine", warmup_steps=0, decay_steps=STEPS)[0] == 1.0


def test_each_schedule_has_a_worked_example() -> None:
    functions = [value for value in vars(custom_scheduler).values() if isinstance(value, FunctionType)]
    public = [
        value for value in functions if value.__module__ == custom_scheduler.__name__ and value.__name__[0] != "_"
    ]
    assert len(public) == 6
    assert all(">>> " in (function.__doc__ or "") for function in public)
