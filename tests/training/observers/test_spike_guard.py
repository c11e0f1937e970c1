import math
import random
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest

from gpt.checkpoint.rollback import RollbackTargets
from gpt.configs.observer_config import SpikeConfig
from gpt.errors import UserError
from gpt.resume.journal import Journal
from gpt.training.events import MetricsReady, RollBack, Save, SpikeSeen, TrainStart
from gpt.training.observers.spike_guard import SpikeGuard
from gpt.utils.distributed import DistContext

NAN = math.nan
TARGETS = RollbackTargets(origin=0, interval=10)


def make(journal: Path | None = None, *, scaled: bool = False, **settings: Any) -> SpikeGuard:
    records = Journal(journal or Path("journal.jsonl"), "order", [], DistContext("cpu"))
    config = SpikeConfig.model_validate({"window": 16} | settings)
    return SpikeGuard(config, records, TARGETS, scaled=scaled, name_documents=lambda step: f"the documents of {step}")


def report(guard: SpikeGuard, first: int, losses: Iterable[float], skipped: tuple[int, ...] = ()) -> list[Any]:
    """Report the losses of steps `first`, ...; those with a NaN were skipped."""
    values = tuple(losses)
    nan = tuple(step for step, loss in enumerate(values, first) if not math.isfinite(loss))
    return list(guard.on_event(MetricsReady(first + len(values) - 1, {}, values, tuple(sorted({*nan, *skipped})))))


def noise(n: int, level: float = 3.0) -> list[float]:
    draw = random.Random(0)
    return [draw.gauss(level, 0.05) for _ in range(n)]


def test_spike_has_its_step_and_deviation() -> None:
    guard = make()
    assert report(guard, 1, noise(16)) == []
    (spike,) = report(guard, 17, [3.0, 30.0, 3.1])
    assert isinstance(spike, SpikeSeen)
    assert (spike.step, spike.loss) == (18, 30.0)
    assert spike.median == pytest.approx(3.0, abs=0.05)
    assert spike.deviations > 100


def test_noise_and_falling_and_flat_losses_are_no_spikes() -> None:
    for losses in (noise(2000), [8 * 0.99**step for step in range(500)], [0.5] * 100 + [0.6] * 100, [2.0] * 50 + [0.1]):
        assert report(make(), 1, losses) == []


def test_no_spike_is_found_before_a_quarter_of_the_window_is_full() -> None:
    assert report(make(), 1, [3.0, 3.1, 3.2, 99.0]) == []
    assert len(report(make(), 1, [3.0, 3.1, 3.2, 3.1, 99.0])) == 1


def test_spikes_never_enter_the_window() -> None:
    guard = make()
    report(guard, 1, noise(16))
    before = guard.state_json()
    assert len(report(guard, 17, [50.0] * 40)) == 40
    assert guard.state_json() == before


def test_state_does_not_depend_on_the_log_interval_and_survives_json() -> None:
    losses = [*noise(20), 40.0, *noise(3), NAN, *noise(4), NAN, NAN]
    once, many, resumed = make(), make(), make()
    events = report(once, 1, losses)
    pieces = [report(many, step, [loss]) for step, loss in enumerate(losses, 1)]
    assert [event for piece in pieces for event in piece] == events
    assert once.state_json() == many.state_json()
    resumed.load_json(once.state_json())
    assert resumed.state_json() == once.state_json()
    assert once.state_json()["skips"] == 2
    assert not any(map(math.isnan, once.state_json()["window"]))


def test_too_many_skips_in_a_row_end_the_run_and_name_step_and_documents() -> None:
    guard = make(max_skips=3)
    report(guard, 1, [3.0, NAN, NAN, 3.0, NAN])
    assert report(guard, 6, [NAN, 3.0]) == []
    with pytest.raises(UserError, match=r"^step 10: .* last 3 steps .* on the documents of 10$"):
        report(guard, 8, [NAN, NAN, NAN, NAN])


def test_overflow_that_the_scaler_handles_is_not_counted() -> None:
    guard = make(max_skips=2, scaled=True)
    assert report(guard, 1, [3.0] * 10, skipped=tuple(range(1, 11))) == []
    with pytest.raises(UserError, match="step 12"):
        report(guard, 11, [NAN, NAN])
    with pytest.raises(UserError, match="step 2:"):
        report(make(max_skips=2), 1, [3.0] * 10, skipped=tuple(range(1, 11)))


def test_rollback_names_the_first_spike_and_the_skipped_steps_since_the_target_and_saves_at_the_start() -> None:
    guard = make(rollback=True)
    assert list(guard.on_event(TrainStart(0, None, None))) == [Save()]  # type: ignore[arg-type]
    assert list(make().on_event(TrainStart(0, None, None))) == []  # type: ignore[arg-type]
    report(guard, 1, [*noise(8), NAN, *noise(7)])  # a rollback does not go back before step 10
    *spikes, command = report(guard, 17, [3.0, NAN, 30.0, 3.0, 31.0])
    assert [spike.step for spike in spikes] == [19]
    assert isinstance(command, RollBack)
    assert command.bad_steps == {18: "not finite", 19: "spike: loss 30.0000"}
    assert "step 19 was 30.0000" in command.reason


@pytest.mark.parametrize("seed", range(20))
def test_rollback_depends_on_no_boundary_between_reports(seed: int) -> None:
    losses = [*noise(25), NAN, *noise(2), 40.0, NAN, 50.0, *noise(9)]
    draw, guard = random.Random(seed), make(rollback=True)
    step, commands = 0, []
    while not commands:
        if draw.random() < 0.3:  # a stop saves the state, and another process goes on
            saved = guard.state_json()
            guard = make(rollback=True)
            guard.load_json(saved)
            guard.on_event(TrainStart(step, None, None))  # type: ignore[arg-type]
        n = draw.randint(1, 12)
        events = report(guard, step + 1, losses[step : step + n])
        commands = [event for event in events if isinstance(event, RollBack)]
        step += n
    (command,) = commands
    assert command.bad_steps == {26: "not finite", 29: "spike: loss 40.0000"}
    assert command.reason.startswith("the loss of step 29 was 40.0000")


def test_number_of_rollbacks_is_limited(tmp_path: Path) -> None:
    journal = Journal(tmp_path / "journal.jsonl", "order", [], DistContext("cpu"))
    config = SpikeConfig(window=16, rollback=True, max_rollbacks=2)
    guard = SpikeGuard(config, journal, TARGETS, scaled=False, name_documents=str)
    for _ in range(2):
        report(guard, 1, noise(16))
        command = report(guard, 17, [30.0])[-1]
        journal.add_rollback(command.bad_steps, 16, command.reason)
    with pytest.raises(UserError, match=r"was rolled back 2 times before; .*--spike.max-rollbacks"):
        report(guard, 17, [30.0])
