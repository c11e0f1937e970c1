import pytest
import torch
from torch import nn

from gpt.errors import UserError
from gpt.training.events import StepEnd, TrainStart
from gpt.training.observers.replica_guard import CHUNK_ELEMENTS, ReplicaGuard, digest, find_differing_ranks
from gpt.utils.distributed import DistContext
from tests.training.example_events import PLAN


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_digest_depends_on_every_bit_and_its_place(dtype: torch.dtype) -> None:
    integers = {2: torch.int16, 4: torch.int32, 8: torch.int64}[dtype.itemsize]
    tensors = [torch.randn(n, generator=torch.Generator().manual_seed(n)).to(dtype) for n in (1, CHUNK_ELEMENTS + 7)]
    before = int(digest(tensors))
    assert before == int(digest([tensor.clone() for tensor in tensors]))
    bits = tensors[1].view(integers)
    for place in (0, 1, CHUNK_ELEMENTS - 1, CHUNK_ELEMENTS, CHUNK_ELEMENTS + 6):
        for bit in (0, 1, dtype.itemsize * 8 - 2):
            bits[place] ^= 1 << bit
            assert int(digest(tensors)) != before
            bits[place] ^= 1 << bit
    for a, b in ((0, 1), (5, CHUNK_ELEMENTS - 3), (2, CHUNK_ELEMENTS + 2)):
        bits[[a, b]] = bits[[b, a]]
        assert int(digest(tensors)) != before
        bits[[a, b]] = bits[[b, a]]
    assert int(digest(tensors)) == before
    assert int(digest(tensors[::-1])) != before


def test_digest_distinguishes_signed_zeros() -> None:
    assert int(digest([torch.zeros(2)])) != int(digest([-torch.zeros(2)]))


@pytest.mark.parametrize(
    ("digests", "odd"),
    [((5,), []), ((5, 5), []), ((5, 6), [1]), ((6, 5, 5), [0]), ((5, 5, 6, 7), [2, 3]), ((5, 6, 5, 5), [1])],
)
def test_minority_is_named_and_of_two_ranks_the_second(digests: tuple[int, ...], odd: list[int]) -> None:
    assert find_differing_ranks(digests) == odd


def test_weights_are_compared_at_the_start_at_the_interval_and_before_saves() -> None:
    class Others(DistContext):
        def __init__(self) -> None:
            super().__init__("cpu")
            self.world_size, self.asked = 3, 0

        def gather(self, value):  # type: ignore[no-untyped-def]
            self.asked += 1
            return [value, value, value + (self.asked == 4)]

    dist = Others()
    guard = ReplicaGuard(nn.Linear(2, 2), 4, PLAN, dist)
    compared = []
    guard.on_event(TrainStart(0, PLAN, None))
    for step in range(1, PLAN.max_steps + 1):
        before = dist.asked
        try:
            guard.on_event(StepEnd(step, 1))
        except UserError as error:
            assert str(error).startswith("the weights of rank 2 differ from those of the others after step")
        if dist.asked > before:
            compared.append(step)
    assert dist.asked == len(compared) + 1
    assert compared == [step for step in range(1, PLAN.max_steps + 1) if step % 4 == 0 or PLAN.saves_at(step)]
