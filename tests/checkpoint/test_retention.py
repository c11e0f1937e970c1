import pytest

from gpt.checkpoint.retention import steps_to_keep
from gpt.checkpoint.rollback import RollbackTargets


@pytest.mark.parametrize(
    ("keep", "keep_best", "expected"),
    [
        (0, False, {1, 2, 3, 4}),
        (0, True, {1, 2, 3, 4}),
        (1, False, {4}),
        (2, False, {3, 4}),
        (9, False, {1, 2, 3, 4}),
        (1, True, {2, 4}),
        (3, True, {2, 3, 4}),
    ],
)
def test_steps_to_keep_are_the_newest_and_the_best(keep: int, keep_best: bool, expected: set[int]) -> None:
    losses = {1: 3.0, 2: 1.5, 3: 2.0, 9: 0.1}  # of 9 there is no checkpoint any more
    assert steps_to_keep([1, 2, 3, 4], losses, keep=keep, keep_best=keep_best) == expected


def test_the_best_of_equal_losses_is_the_newest() -> None:
    assert steps_to_keep([1, 2, 3], {1: 1.0, 2: 1.0}, keep=1, keep_best=True) == {2, 3}


def test_without_an_evaluation_no_step_is_the_best() -> None:
    assert steps_to_keep([1, 2], {}, keep=1, keep_best=True) == {2}


def test_newest_rollback_target_is_kept_whatever_is_saved_after_it_and_the_best_up_to_it() -> None:
    targets, steps = RollbackTargets(origin=0, interval=10), [0, 8, 10, 20, 21, 22, 23]
    assert steps_to_keep(steps, {}, keep=2, keep_best=False, targets=targets) == {20, 22, 23}
    losses = {8: 2.0, 20: 3.0, 22: 1.0}
    assert steps_to_keep(steps, losses, keep=1, keep_best=True, targets=targets) == {8, 20, 22, 23}
    assert steps_to_keep([0, 3, 4], {}, keep=1, keep_best=False, targets=RollbackTargets(0, 0)) == {0, 4}
    assert steps_to_keep([3, 4], {}, keep=1, keep_best=False, targets=targets) == {4}
