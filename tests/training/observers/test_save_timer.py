from gpt.training.events import CheckpointSaved, Save, StepEnd, TrainStart
from gpt.training.observers.save_timer import SaveTimer
from gpt.utils.distributed import DistContext
from gpt.utils.pending_flag import PendingFlag
from tests.training.example_events import PLAN


class Clock:
    def __init__(self) -> None:
        self.now = 1e6

    def __call__(self) -> float:
        return self.now


def find_saved_steps(timer: SaveTimer, clock: Clock, seconds: dict[int, float]) -> list[int]:
    """Return the steps that are saved, if so many seconds pass before some of them."""
    saved = []
    for step in range(1, 20):
        clock.now += seconds.get(step, 0)
        if list(timer.on_event(StepEnd(step, step))) == [Save()]:
            saved.append(step)
    return saved


def test_save_comes_one_step_after_it_is_due_and_once() -> None:
    clock = Clock()
    timer = SaveTimer(2, DistContext("cpu"), clock)
    clock.now += 1000  # until the first step
    timer.on_event(TrainStart(0, PLAN, None))
    assert find_saved_steps(timer, clock, {3: 119, 5: 1, 10: 60, 12: 59, 13: 60}) == [6, 14]


def test_other_checkpoints_restart_the_timer() -> None:
    clock = Clock()
    timer = SaveTimer(2, DistContext("cpu"), clock)
    clock.now += 100
    timer.on_event(CheckpointSaved(1, "here"))
    assert find_saved_steps(timer, clock, {2: 100, 8: 20}) == [9]


def test_clock_of_other_ranks_is_ignored() -> None:
    class Second(DistContext):
        def __init__(self) -> None:
            super().__init__("cpu")
            self.rank = 1

        def all_reduce_max_async(self, value: int) -> PendingFlag:
            assert value == 0
            return super().all_reduce_max_async(value)

    clock = Clock()
    assert find_saved_steps(SaveTimer(1, Second(), clock), clock, {2: 1000}) == []
