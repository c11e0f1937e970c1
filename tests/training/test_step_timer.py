from contextlib import nullcontext

import pytest
import torch

from gpt.models.gpt import GPT
from gpt.training import step_timer
from gpt.training.step_timer import PHASES, StepTimer
from tests.training.test_train_step import CONFIG, cut, make

CPU = torch.device("cpu")


class Clock:
    """A second passes between two readings."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        self.now += 1
        return self.now


def test_every_part_of_a_step_is_in_its_phase() -> None:
    timer = StepTimer(CPU, clock=Clock())
    make(GPT(CONFIG, seed=0), cut(2), timer=timer)(0)  # four micro-batches, and the reduction of their gradients
    assert timer.take() == {"data": 1, "forward": 4, "backward": 5, "optimizer": 1}
    assert timer.take() == dict.fromkeys(PHASES, 0)


def test_phases_add_up_until_they_are_taken() -> None:
    timer = StepTimer(CPU, clock=Clock())
    step = make(GPT(CONFIG, seed=0), cut(4), timer=timer)
    for at in range(3):
        step(at)
    assert timer.take() == {"data": 3, "forward": 6, "backward": 9, "optimizer": 3}


@pytest.mark.parametrize("synchronizes", [False, True])
def test_only_a_synchronizing_timer_waits_for_the_device(synchronizes: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    waits: list[torch.device] = []
    monkeypatch.setattr(step_timer, "synchronize", waits.append)
    timer = StepTimer(CPU)
    timer.synchronizes = synchronizes
    make(GPT(CONFIG, seed=0), cut(4), timer=timer)(0)
    assert len(waits) == (14 if synchronizes else 0)  # data, 2 forward, 3 backward, optimizer: at both ends


def test_gpu_phases_are_read_from_events_that_nobody_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    class Event:
        """An event of a GPU that has passed all events before the one numbered `passed`."""

        passed, created, waited = 0, 0, 0

        def __init__(self, enable_timing: bool):
            self.number, Event.created = Event.created, Event.created + 1

        def record(self) -> None: ...

        def query(self) -> bool:
            return self.number < Event.passed

        def synchronize(self) -> None:
            Event.waited += not self.query()

        def elapsed_time(self, end: "Event") -> float:
            return 1000.0 * (end.number - self.number)

    monkeypatch.setattr(torch.cuda, "Event", Event)
    timer = StepTimer(torch.device("cuda"), clock=Clock())
    for phase in PHASES:
        with timer.phase(phase):
            pass
    assert len(timer._events) == 3  # data is what the host waits for
    Event.passed = 4
    with timer.phase("forward"):
        pass
    assert (len(timer._events), Event.waited) == (2, 0)
    assert timer.take() == {"data": 1, "forward": 2, "backward": 1, "optimizer": 1}
    assert (len(timer._events), Event.waited) == (0, 2)


def test_timed_step_is_the_same_step() -> None:
    class NoTimer(StepTimer):
        def phase(self, name):  # type: ignore[no-untyped-def, override]
            return nullcontext()

    ours, theirs = GPT(CONFIG, seed=0), GPT(CONFIG, seed=0)
    timed, plain = make(ours, cut(4)), make(theirs, cut(4), timer=NoTimer(CPU))
    for step in range(2):
        assert torch.equal(timed(step).loss_sum, plain(step).loss_sum)
    for mine, other in zip(ours.parameters(), theirs.parameters(), strict=True):
        assert torch.equal(mine, other)
