from collections.abc import Callable
from types import SimpleNamespace

import torch

from gpt.training.events import StepEnd, TrainStart
from gpt.training.observers.hang_guard import HangGuard
from gpt.training.step_timer import StepTimer
from gpt.utils.hang import Progress


class FakeHeartbeat:
    read_progress: Callable[[], Progress] | None = None

    def start_training(self, read_progress: Callable[[], Progress]) -> None:
        self.read_progress = read_progress

    def end_training(self) -> None:
        self.read_progress = None


def test_progress_counts_parts_since_the_last_step_and_knows_when_a_step_is_over() -> None:
    timer, heartbeat = StepTimer(torch.device("cpu")), FakeHeartbeat()
    guard = HangGuard(timer, SimpleNamespace(heartbeat=heartbeat))  # type: ignore[arg-type]
    guard.on_event(TrainStart(5, None, None))  # type: ignore[arg-type]
    read = heartbeat.read_progress
    assert read is not None
    assert read() == Progress(5, 0, in_step=False)
    with timer.phase("evaluation"):
        assert read() == Progress(5, 1, in_step=False)
    with timer.phase("data"):
        assert read() == Progress(5, 2, in_step=True)
    with timer.phase("optimizer"):
        pass
    assert read() == Progress(5, 3, in_step=True)  # a report waits for the GPU here
    guard.on_event(StepEnd(6, 100))
    assert read() == Progress(6, 0, in_step=False)
    with timer.phase("saving"):
        assert read() == Progress(6, 1, in_step=False)
    guard.close(None)
    assert heartbeat.read_progress is None


def test_one_rank_needs_no_heartbeat() -> None:
    guard = HangGuard(StepTimer(torch.device("cpu")), SimpleNamespace(heartbeat=None))  # type: ignore[arg-type]
    assert guard.on_event(TrainStart(0, None, None)) == ()  # type: ignore[arg-type]
    guard.close(None)
