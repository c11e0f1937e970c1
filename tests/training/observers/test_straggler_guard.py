import logging
from collections.abc import Iterator
from contextlib import nullcontext
from types import MappingProxyType

import pytest
import torch

from gpt.training.events import MetricsReady
from gpt.training.observers.straggler_guard import IN_A_ROW, OwnTime, StragglerGuard
from gpt.utils.distributed import DistContext


def test_own_time_is_that_of_forward_passes_and_waiting() -> None:
    times: Iterator[float] = iter([1.0, 3.0, 10.0, 14.0])
    own = OwnTime(torch.device("cpu"), clock=lambda: next(times))
    with own.waiting():
        pass
    with own.around(nullcontext)():
        pass
    assert own.take() == 6
    assert own.take() == 0


class Others(DistContext):
    """The times of three ranks, as the test gives them."""

    def __init__(self) -> None:
        super().__init__("cpu")
        self.world_size, self.seconds = 3, [0.1, 0.1, 0.1]

    def gather(self, value):  # type: ignore[no-untyped-def]
        return self.seconds


def test_a_rank_that_stays_slow_is_named_once_and_a_hiccup_is_not(caplog: pytest.LogCaptureFixture) -> None:
    dist = Others()
    guard = StragglerGuard(OwnTime(torch.device("cpu")), dist)

    def report(times: int) -> None:
        for _ in range(times):
            assert list(guard.on_event(MetricsReady(7, MappingProxyType({}), (1.0, 1.0)))) == []

    with caplog.at_level(logging.WARNING):
        dist.seconds = [0.1, 1.0, 0.11]
        report(IN_A_ROW - 1)
        dist.seconds = [0.1, 0.19, 0.11]
        report(1)
        assert caplog.messages == []
        dist.seconds = [0.1, 1.1, 0.11]
        report(2 * IN_A_ROW)
    (message,) = caplog.messages
    assert message.startswith("step 7: rank 1 is slow, and the others wait for it: 1100.0 ms")
    assert message.endswith("10.0 times the median")


def test_of_two_the_slow_one_is_named(caplog: pytest.LogCaptureFixture) -> None:
    dist = Others()
    dist.world_size, dist.seconds = 2, [1.0, 0.1]
    guard = StragglerGuard(OwnTime(torch.device("cpu")), dist)
    with caplog.at_level(logging.WARNING):
        for _ in range(IN_A_ROW):
            guard.on_event(MetricsReady(7, MappingProxyType({}), (1.0,)))
    assert "rank 0 is slow" in caplog.text
