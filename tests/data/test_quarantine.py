import doctest
import random

from gpt.data import quarantine as quarantine_module
from gpt.data.quarantine import Quarantine


def test_worked_example() -> None:
    results = doctest.testmod(quarantine_module)
    assert (results.attempted, results.failed) == (2, 0)


def test_steps_take_the_batches_outside_quarantine_in_order() -> None:
    for seed in range(20):
        left_out = random.Random(seed).sample(range(40), 12)
        quarantine = Quarantine(left_out)
        expected = [batch for batch in range(60) if batch not in left_out]
        assert [quarantine.find_batch(step) for step in range(48)] == expected


def test_adding_a_batch_changes_no_earlier_step() -> None:
    quarantine = Quarantine([3, 4, 9])
    before = [quarantine.find_batch(step) for step in range(12)]
    quarantine.add(before[6])
    quarantine.add(before[6])
    after = [quarantine.find_batch(step) for step in range(11)]
    assert after == before[:6] + before[7:]
    assert before[6] in quarantine
    assert before[5] not in quarantine
