import logging
from types import MappingProxyType

import pytest
import torch

from gpt.training.events import MetricsReady
from gpt.training.observers.straggler_guard import REPORTS_IN_A_ROW, StragglerGuard
from gpt.training.step_timer import StepTimer
from gpt.utils.distributed import DistContext


class Others(DistContext):
    """Three ranks, whose seconds the test sets."""

    def __init__(self) -> None:
        super().__init__("cpu")
        self.world_size, self.seconds = 3, [0.1, 0.1, 0.1]

    def gather(self, value):  # type: ignore[no-untyped-def]
        return self.seconds


def test_rank_that_stays_slow_is_named_once_and_one_slow_report_is_not(caplog: pytest.LogCaptureFixture) -> None:
    dist = Others()
    guard = StragglerGuard(StepTimer(torch.device("cpu")), dist)

    def report(times: int) -> None:
        for _ in range(times):
            assert list(guard.on_event(MetricsReady(7, MappingProxyType({}), (1.0, 1.0)))) == []

    with caplog.at_level(logging.WARNING):
        dist.seconds = [0.1, 1.0, 0.11]
        report(REPORTS_IN_A_ROW - 1)
        dist.seconds = [0.1, 0.19, 0.11]
        report(1)
        assert caplog.messages == []
        dist.seconds = [0.1, 1.1, 0.11]
        report(2 * REPORTS_IN_A_ROW)
    (message,) = caplog.messages
    assert message.startswith("step 7: rank 1 is slow, and the others wait for it: 1100.0 ms")
    assert message.endswith("10.0 times the median")


def test_slow_one_of_two_ranks_is_named(caplog: pytest.LogCaptureFixture) -> None:
    dist = Others()
    dist.world_size, dist.seconds = 2, [1.0, 0.1]
    guard = StragglerGuard(StepTimer(torch.device("cpu")), dist)
    with caplog.at_level(logging.WARNING):
        for _ in range(REPORTS_IN_A_ROW):
            guard.on_event(MetricsReady(7, MappingProxyType({}), (1.0,)))
    assert "rank 0 is slow" in caplog.text


def test_data_and_forward_count_per_step_and_backward_does_not() -> None:
    class Gathering(DistContext):
        def gather(self, value):  # type: ignore[no-untyped-def]
            gathered.append(value)
            return [value]

    gathered: list[float] = []
    clock = iter([0.0, 1.0, 10.0, 13.0, 20.0, 90.0])
    timer = StepTimer(torch.device("cpu"), clock=lambda: next(clock))
    guard = StragglerGuard(timer, Gathering("cpu"))
    for phase in ("data", "forward", "backward"):
        with timer.phase(phase):
            pass
    guard.on_event(MetricsReady(2, MappingProxyType({}), (1.0, 1.0)))
    guard.on_event(MetricsReady(4, MappingProxyType({}), (1.0, 1.0)))
    assert gathered == [2.0, 0.0]
