import pytest
import torch

from gpt.machine.memory import LiveMemory, extrapolate_max_size, search_max_size

CPU = torch.device("cpu")


def test_live_memory_counts_what_exists_and_its_most() -> None:
    before = torch.ones(1000)
    with LiveMemory() as memory:
        made = before + 1
        view = made.view(10, 100)[2:]
        before.mul_(2)
        before.t()
        assert memory.now == 4000
        del made
        assert memory.now == 4000
        del view
        assert memory.now == 0
        torch.ones(500, dtype=torch.float64).sum().item()
    assert (memory.now, memory.peak) == (0, 4008)


def test_live_memory_sees_the_backward_pass() -> None:
    weight = torch.ones(1000, requires_grad=True)
    with LiveMemory() as memory:
        loss = weight.exp().sum()
        assert memory.now == 4004
        loss.backward()
        del loss
        assert memory.now == 4000
    assert weight.grad is not None


@pytest.mark.parametrize(
    ("room", "most"), [(999, 0), (1399, 0), (1400, 1), (2599, 3), (2600, 4), (3400, 6), (10**6, 12)]
)
def test_most_by_measure_is_the_largest_that_fits(room: int, most: int) -> None:
    made_once: list[torch.Tensor] = []

    def attempt(size: int) -> None:  # a thousand bytes, four hundred for each, and some that stay
        if not made_once:
            made_once.append(torch.empty(10**5, dtype=torch.uint8))
        parts = [torch.empty(1000, dtype=torch.uint8), *(torch.empty(400, dtype=torch.uint8) for _ in range(size))]
        del parts

    assert extrapolate_max_size(attempt, [1, 2, 3, 4, 6, 12], room) == most


@pytest.mark.parametrize(("room", "most"), [(0, 0), (1, 1), (5, 4), (11, 6), (12, 12), (99, 12)])
def test_most_by_trial_is_the_largest_that_does_not_run_out(room: int, most: int) -> None:
    tried: list[int] = []

    def attempt(size: int) -> None:
        tried.append(size)
        if size > room:
            raise torch.OutOfMemoryError

    assert search_max_size(attempt, [1, 2, 3, 4, 6, 12], reserved=8, device=CPU) == most
    assert len(tried) <= 3


def test_other_errors_are_not_taken_for_a_lack_of_memory() -> None:
    def attempt(size: int) -> None:
        raise RuntimeError("a defect")

    with pytest.raises(RuntimeError, match="a defect"):
        search_max_size(attempt, [1], reserved=0, device=CPU)
