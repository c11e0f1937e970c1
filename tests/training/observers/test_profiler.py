import json
import logging
from collections.abc import Callable
from pathlib import Path

import pytest

from gpt.configs.observer_config import ProfileConfig
from gpt.configs.train_config import TrainConfig
from gpt.pipeline import build_trainer
from gpt.run import open_run
from gpt.training.events import StepEnd, TrainStart
from gpt.training.observers.profiler import Profiler
from tests.training.example_events import PLAN


def count_updates(trace: Path) -> int:
    """Return the number of optimizer steps in a trace."""
    events = json.loads(trace.read_text())["traceEvents"]
    return sum(str(event.get("name", "")).startswith("Optimizer.step#") for event in events)


@pytest.mark.parametrize(("start", "steps", "traced"), [(1, 2, 2), (3, 1, 1), (4, 100, 2)])
def test_trace_has_the_configured_steps(
    tiny: Callable[..., TrainConfig], tmp_path: Path, start: int, steps: int, traced: int
) -> None:
    config = tiny(tmp_path, max_steps=5, eval={"interval": 0}, profile={"start": start, "steps": steps})
    build_trainer(open_run(config)).train()
    assert count_updates(tmp_path / "trace.json") == traced


def test_steps_before_the_resumed_step_are_reported(caplog: pytest.LogCaptureFixture, tmp_path: Path) -> None:
    profiler = Profiler(ProfileConfig(start=3, steps=2), tmp_path / "trace.json")
    with caplog.at_level(logging.WARNING):
        profiler.on_event(TrainStart(9, PLAN, None))
    profiler.close(None)
    assert "--profile.start is 3 but the run resumes at step 9" in caplog.text
    assert not (tmp_path / "trace.json").exists()


def test_other_ranks_trace_nothing(tmp_path: Path) -> None:
    profiler = Profiler(ProfileConfig(start=1, steps=1), None)
    for event in (TrainStart(0, PLAN, None), StepEnd(1, 10)):
        assert list(profiler.on_event(event)) == []
    profiler.close(None)
    assert list(tmp_path.iterdir()) == []
