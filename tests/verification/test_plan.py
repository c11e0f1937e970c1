from collections import Counter

from gpt.verification.plan import KillPhase, RunOutline, plan_kills

OUTLINE = RunOutline(0, 100, 10, frozenset(range(10, 101, 10)), frozenset({33, 66, 99}))


def test_seed_decides_the_plan_and_half_of_the_kills_wait_for_no_phase() -> None:
    plan = plan_kills(3, 100, OUTLINE)
    assert plan == plan_kills(3, 100, OUTLINE)
    assert plan != plan_kills(4, 100, OUTLINE)
    assert Counter(planned.phase for planned in plan)[KillPhase.STEP] == 50
    assert {planned.phase for planned in plan} == set(KillPhase)
    signals = Counter(planned.signal.name for planned in plan)
    assert signals["SIGKILL"] in (66, 67)
    assert 16 <= signals["SIGTERM"] <= 17 and 16 <= signals["SIGINT"] <= 17
    stopped = {planned.phase for planned in plan if planned.signal.name != "SIGKILL"}
    assert stopped == set(KillPhase)


def test_kills_are_planned_in_order_and_before_the_last_interval() -> None:
    steps = [planned.step for planned in plan_kills(3, 100, OUTLINE)]
    assert steps == sorted(steps)
    assert 80 < steps[-1] < OUTLINE.last_interval_start == 90
    without_interval = RunOutline(0, 100, 0, frozenset(), frozenset())
    assert 90 < plan_kills(3, 100, without_interval)[-1].step < 100


def test_run_within_one_epoch_has_no_kill_at_an_epoch_boundary() -> None:
    plan = plan_kills(3, 100, RunOutline(0, 100, 10, frozenset(), frozenset()))
    assert KillPhase.EPOCH_BOUNDARY not in {planned.phase for planned in plan}
