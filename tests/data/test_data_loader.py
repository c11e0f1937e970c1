import numpy as np
import pytest
import torch

from gpt.configs.run_plan import BatchPlan
from gpt.data.data_loader import DataLoader, MicroBatch
from gpt.data.shards import TokenStream, write_shards

BLOCK = 8


@pytest.fixture(scope="module")
def stream(tmp_path_factory: pytest.TempPathFactory) -> TokenStream:
    folder = tmp_path_factory.mktemp("shards")
    return TokenStream(folder, write_shards(folder, "train", [(np.arange(2000, dtype=np.uint32), 1)], np.uint16))


def batches(stream: TokenStream, steps: list[int], world_size: int = 1, rank: int = 0) -> list[list[MicroBatch]]:
    plan = BatchPlan(micro_batch_size=2, block_size=BLOCK, world_size=world_size, grad_accum_steps=4 // world_size)
    with DataLoader(stream, plan, seed=1, rank=rank, device=torch.device("cpu")) as loader:
        return [loader.batches_of(step) for step in steps]


def test_targets_are_the_next_tokens(stream: TokenStream) -> None:
    for batch in batches(stream, [0])[0]:
        assert batch.inputs.shape == batch.targets.shape == (2, BLOCK)
        assert batch.inputs.dtype == torch.int64
        assert torch.equal(batch.inputs + 1, batch.targets)


@pytest.mark.parametrize("world_size", [2, 4])
def test_the_global_batch_is_the_same_at_every_world_size(stream: TokenStream, world_size: int) -> None:
    for step in (0, 7, 61, 62):  # an epoch has 249 windows, a step 8: step 31 straddles two
        whole = {batch.index: batch.inputs.tolist() for batch in batches(stream, [step])[0]}
        parts = {
            batch.index: batch.inputs.tolist()
            for rank in range(world_size)
            for batch in batches(stream, [step], world_size, rank)[0]
        }
        assert parts == whole
        assert sorted(whole) == [0, 1, 2, 3]


def test_an_epoch_shows_every_window_once(stream: TokenStream) -> None:
    shown = [tuple(row) for step in batches(stream, list(range(31))) for batch in step for row in batch.inputs.tolist()]
    assert len(set(shown)) == len(shown) == 31 * 8


def test_a_step_is_the_same_in_order_and_at_a_jump(stream: TokenStream) -> None:
    in_order = batches(stream, [0, 1, 2, 3])[3]
    at_once = batches(stream, [3])[0]
    assert [b.inputs.tolist() for b in in_order] == [b.inputs.tolist() for b in at_once]
