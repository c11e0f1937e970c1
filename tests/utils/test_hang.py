"""Judging heartbeats, without threads."""

import pytest

from gpt.utils.hang import Beat, Limits, Progress, Sighting, describe_hang, find_hung_ranks

LIMITS = Limits.for_steps(10)
NOW = 1000.0


def make_sighting(
    step: int = 4,
    parts: int = 3,
    *,
    in_step: bool = True,
    blocked: bool = False,
    failed: bool = False,
    heard: float = 0.5,
    advanced: float = 0.5,
    place: str = "",
) -> Sighting:
    """Return a sighting that is `heard` seconds old, of progress that is `advanced` seconds old."""
    beat = Beat(9, Progress(step, parts, in_step), blocked, failed, place)
    return Sighting(beat, NOW - heard, NOW - advanced)


def find(*sightings: Sighting) -> list[int]:
    return find_hung_ranks(dict(enumerate(sightings)), NOW, LIMITS)


def test_ranks_that_advance_do_not_hang() -> None:
    assert find(make_sighting(4), make_sighting(5)) == []


def test_silent_rank_hangs_whatever_it_did_last() -> None:
    assert find(make_sighting(advanced=13, blocked=True), make_sighting(in_step=False, heard=13, advanced=13)) == [1]
    assert find(make_sighting(), make_sighting(heard=11)) == []


def test_work_between_steps_may_take_as_long_as_it_likes() -> None:
    evaluates = make_sighting(in_step=False, advanced=3600)
    assert find(evaluates, evaluates) == []


def test_busy_ranks_in_the_same_step_do_not_hang() -> None:
    computes = make_sighting(advanced=60)
    assert find(computes, computes) == []


@pytest.mark.parametrize("in_step", [True, False])
def test_rank_that_blocked_ranks_wait_for_is_the_one_behind(in_step: bool) -> None:
    waits, behind = make_sighting(5, blocked=True, advanced=13), make_sighting(4, in_step=in_step, advanced=13)
    assert find(waits, behind, waits) == [1]
    assert find(waits, make_sighting(4, advanced=1), waits) == []  # it is slow, but comes further


def test_blocked_ranks_with_the_same_progress_hang_together() -> None:
    blocked = make_sighting(blocked=True, advanced=13)
    assert find(blocked, make_sighting(advanced=11.9)) == [0, 1]


def test_rank_whose_collective_failed_waited_for_the_others() -> None:
    assert find(make_sighting(advanced=13), make_sighting(failed=True, advanced=13)) == [0]
    assert find(make_sighting(advanced=11), make_sighting(failed=True, advanced=13)) == []


def test_short_timeouts_leave_a_busy_machine_time_to_beat() -> None:
    limits = Limits.for_steps(1)
    assert find_hung_ranks({0: make_sighting(), 1: make_sighting(heard=6.5)}, NOW, limits) == []
    assert find_hung_ranks({0: make_sighting(), 1: make_sighting(heard=7.5)}, NOW, limits) == [1]


def test_message_names_each_rank_and_its_place() -> None:
    sightings = {
        0: make_sighting(6, advanced=9, place="gpt/training/metrics.py:62"),
        1: make_sighting(heard=13, advanced=13),
        2: make_sighting(in_step=False, advanced=9),
        3: make_sighting(advanced=3),
    }
    assert describe_hang([1], sightings, NOW, LIMITS) == (
        "rank 1 took no part in a step for 10 s (--parallel.step-timeout); rank 1: the process is stopped, or its "
        "machine is gone; rank 0 waits in step 7 at gpt/training/metrics.py:62"
    )
