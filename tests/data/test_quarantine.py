import random

from gpt.data.quarantine import Quarantine


def test_steps_take_the_batches_that_are_not_in_quarantine_in_order() -> None:
    for seed in range(20):
        left_out = random.Random(seed).sample(range(40), 12)
        quarantine = Quarantine(left_out)
        expected = [batch for batch in range(60) if batch not in left_out]
        assert [quarantine.batch_of(step) for step in range(48)] == expected


def test_one_more_batch_changes_no_step_before_its_own() -> None:
    quarantine = Quarantine([3, 4, 9])
    before = [quarantine.batch_of(step) for step in range(12)]
    quarantine.add(before[6])
    quarantine.add(before[6])
    after = [quarantine.batch_of(step) for step in range(11)]
    assert after == before[:6] + before[7:]
    assert before[6] in quarantine
    assert before[5] not in quarantine
