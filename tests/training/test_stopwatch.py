from contextlib import nullcontext
from typing import Any

import torch

from gpt.models.gpt import GPT
from gpt.training.stopwatch import PHASES, Stopwatch, TimedScaler
from tests.training.test_train_step import CONFIG, cut, make


class Clock:
    """A second passes between two looks at it."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        self.now += 1
        return self.now


def watched(model: GPT, stopwatch: Stopwatch) -> Any:
    scaler = TimedScaler("cpu", enabled=False, stopwatch=stopwatch)
    return make(model, scaler=scaler, autocast=stopwatch.around(nullcontext))


def test_every_part_of_a_step_is_in_its_phase() -> None:
    stopwatch = Stopwatch(torch.device("cpu"), clock=Clock())
    step = watched(GPT(CONFIG, seed=0), stopwatch)
    stopwatch.start()
    stopwatch.lap("data")
    step(0, cut(2))  # four micro-batches: before, between and after them lies what is called backward
    stopwatch.lap("optimizer")
    assert stopwatch.stop() == {"data": 1, "forward": 4, "backward": 5, "optimizer": 1}


def test_a_stopwatch_that_does_not_run_looks_at_no_clock() -> None:
    clock = Clock()
    stopwatch = Stopwatch(torch.device("cpu"), clock=clock)
    watched(GPT(CONFIG, seed=0), stopwatch)(0, cut(4))
    assert clock.now == 0
    assert stopwatch.stop() == dict.fromkeys(PHASES, 0)


def test_a_timed_step_is_the_same_step() -> None:
    ours, theirs = GPT(CONFIG, seed=0), GPT(CONFIG, seed=0)
    stopwatch = Stopwatch(torch.device("cpu"))
    stopwatch.start()
    timed, plain = watched(ours, stopwatch), make(theirs)
    for step in range(2):
        assert torch.equal(timed(step, cut(4)).loss_sum, plain(step, cut(4)).loss_sum)
    for mine, other in zip(ours.parameters(), theirs.parameters(), strict=True):
        assert torch.equal(mine, other)
