import os
import signal

import pytest

from gpt.training.events import StepEnd, Stop, TrainStart
from gpt.training.observers.stop_signal import StopSignal
from gpt.utils.distributed import DistContext
from gpt.utils.pending_flag import PendingFlag
from tests.training.example_events import PLAN


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_signal_stops_after_the_step_and_handlers_are_restored(number: signal.Signals) -> None:
    before = signal.getsignal(number)
    observer = StopSignal(DistContext("cpu"))
    assert signal.getsignal(number) is before
    observer.on_event(TrainStart(0, PLAN, None))
    try:
        assert list(observer.on_event(StepEnd(1, 1))) == []
        os.kill(os.getpid(), number)
        assert list(observer.on_event(StepEnd(2, 2))) == [Stop(number.name)]
    finally:
        observer.close(None)
    assert signal.getsignal(number) is before


def test_second_ctrl_c_ends_at_once() -> None:
    observer = StopSignal(DistContext("cpu"))
    observer.on_event(TrainStart(0, PLAN, None))
    try:
        os.kill(os.getpid(), signal.SIGINT)
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
    finally:
        observer.close(None)


def test_signal_of_another_rank_stops_one_step_later() -> None:
    class Others(DistContext):
        def __init__(self) -> None:
            super().__init__("cpu")
            self.world_size, self.received = 2, 0

        def all_reduce_max_async(self, value: int) -> PendingFlag:
            return Flag(max(value, self.received))

    class Flag:
        def __init__(self, value: int):
            self.value = value

        def read(self) -> int:
            return self.value

    dist = Others()
    observer = StopSignal(dist)
    try:
        dist.received = signal.SIGTERM
        assert list(observer.on_event(StepEnd(1, 1))) == []
        assert list(observer.on_event(StepEnd(2, 2))) == [Stop("SIGTERM")]
    finally:
        observer.close(None)
