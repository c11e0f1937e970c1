import pytest
import torch

from gpt.machine.memory import LiveMemory, extrapolate_max_size, search_max_size

CPU = torch.device("cpu")


def test_live_memory_counts_live_tensors_and_their_peak() -> None:
    before = torch.ones(1000)
    with LiveMemory() as memory:
        created = before + 1
        view = created.view(10, 100)[2:]
        before.mul_(2)
        before.t()
        assert memory.now == 4000
        del created
        assert memory.now == 4000
        del view
        assert memory.now == 0
        torch.ones(500, dtype=torch.float64).sum().item()
    assert (memory.now, memory.peak) == (0, 4008)


def test_live_memory_counts_gradients_of_the_backward_pass() -> None:
    weight = torch.ones(1000, requires_grad=True)
    with LiveMemory() as memory:
        loss = weight.exp().sum()
        assert memory.now == 4004
        loss.backward()
        del loss
        assert memory.now == 4000
    assert weight.grad is not None


@pytest.mark.parametrize(
    ("room", "expected"), [(999, 0), (1399, 0), (1400, 1), (2599, 3), (2600, 4), (3400, 6), (10**6, 12)]
)
def test_extrapolate_max_size_returns_the_largest_size_that_fits(room: int, expected: int) -> None:
    allocated_once: list[torch.Tensor] = []

    def attempt(size: int) -> None:  # a thousand bytes, four hundred for each, and some that stay
        if not allocated_once:
            allocated_once.append(torch.empty(10**5, dtype=torch.uint8))
        parts = [torch.empty(1000, dtype=torch.uint8), *(torch.empty(400, dtype=torch.uint8) for _ in range(size))]
        del parts

    assert extrapolate_max_size(attempt, [1, 2, 3, 4, 6, 12], room) == expected


@pytest.mark.parametrize(("room", "expected"), [(0, 0), (1, 1), (5, 4), (11, 6), (12, 12), (99, 12)])
def test_search_max_size_returns_the_largest_size_that_does_not_run_out(room: int, expected: int) -> None:
    tried: list[int] = []

    def attempt(size: int) -> None:
        tried.append(size)
        if size > room:
            raise torch.OutOfMemoryError

    assert search_max_size(attempt, [1, 2, 3, 4, 6, 12], reserved=8, device=CPU) == expected
    assert len(tried) <= 3


def test_search_max_size_raises_other_errors() -> None:
    def attempt(size: int) -> None:
        raise RuntimeError("a defect")

    with pytest.raises(RuntimeError, match="a defect"):
        search_max_size(attempt, [1], reserved=0, device=CPU)
