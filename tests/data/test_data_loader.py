import numpy as np
import pytest
import torch

from gpt.configs.batch_plan import BatchPlan
from gpt.data.data_loader import DataLoader, MicroBatch
from gpt.data.order import Mixture
from gpt.data.packing import pack
from gpt.data.quarantine import Quarantine
from gpt.data.sequences import MixedSources, PackedDocuments, Sequences, Windows
from gpt.data.shards import TokenStream
from gpt.utils.helper import IGNORED
from tests.conftest import write_stream

BLOCK = 8
KINDS = ("windows", "packed", "mixed")


@pytest.fixture(scope="module")
def stream(tmp_path_factory: pytest.TempPathFactory) -> TokenStream:
    return write_stream(tmp_path_factory.mktemp("shards"), [(np.arange(2000), 1)])


def load_batches(stream: TokenStream, steps: list[int], world_size: int = 1, rank: int = 0) -> list[list[MicroBatch]]:
    plan = BatchPlan(micro_batch_size=2, block_size=BLOCK, world_size=world_size, grad_accum_steps=4 // world_size)
    windows = Windows(stream, BLOCK, seed=1, document_mask=False)
    with DataLoader(windows, plan, rank=rank, device=torch.device("cpu")) as loader:
        return [list(loader.get_batch(step).micro_batches) for step in steps]


def test_targets_are_the_next_tokens(stream: TokenStream) -> None:
    for batch in load_batches(stream, [0])[0]:
        assert batch.inputs.shape == batch.targets.shape == (2, BLOCK)
        assert batch.inputs.dtype == torch.int64
        assert torch.equal(batch.inputs + 1, batch.targets)


@pytest.mark.parametrize("world_size", [2, 4])
def test_global_batch_is_equal_at_every_world_size(stream: TokenStream, world_size: int) -> None:
    for step in (0, 7, 61, 62):  # an epoch has 249 windows, a step 8: step 31 straddles two
        expected = {batch.index: batch.inputs.tolist() for batch in load_batches(stream, [step])[0]}
        parts = {
            batch.index: batch.inputs.tolist()
            for rank in range(world_size)
            for batch in load_batches(stream, [step], world_size, rank)[0]
        }
        assert parts == expected
        assert sorted(expected) == [0, 1, 2, 3]


def test_epoch_has_every_window_once(stream: TokenStream) -> None:
    shown = [
        tuple(row) for step in load_batches(stream, list(range(31))) for batch in step for row in batch.inputs.tolist()
    ]
    assert len(set(shown)) == len(shown) == 31 * 8


def test_batch_is_equal_in_order_and_after_a_seek(stream: TokenStream) -> None:
    in_order = load_batches(stream, [0, 1, 2, 3])[3]
    at_once = load_batches(stream, [3])[0]
    assert [b.inputs.tolist() for b in in_order] == [b.inputs.tolist() for b in at_once]


@pytest.fixture(scope="module")
def sequences(stream: TokenStream, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Sequences]:
    """Build sequences of each kind whose epochs no step of these tests divides."""
    documents = [(np.arange(n) + 1, 1) for n in (3, 20, 7, 1, 9, 4, 8, 13, 2, 5) * 11]
    of_documents = write_stream(tmp_path_factory.mktemp("documents"), documents)
    packing = pack(of_documents, BLOCK, ends_are_targets=False)
    packed = PackedDocuments(of_documents, packing, BLOCK, seed=1, end_of_text=None, document_mask=True)
    windows = Windows(stream, BLOCK, seed=1, document_mask=True)
    return {"windows": windows, "packed": packed, "mixed": MixedSources([windows, packed], Mixture((2, 1), 1))}


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_sequences_has_one_order_at_every_world_size(sequences: dict[str, Sequences], kind: str) -> None:
    """Load steps of 4 sequences through several epochs: every rank has as many steps, of equal size."""
    orders = []
    for world_size in (1, 2, 4):
        plan = BatchPlan(micro_batch_size=1, block_size=BLOCK, world_size=world_size, grad_accum_steps=4 // world_size)
        steps: list[dict[int, list[list[int]]]] = [{} for _ in range(150)]
        n_targets: list[set[int]] = [set() for _ in steps]
        for rank in range(world_size):
            with DataLoader(sequences[kind], plan, rank=rank, device=torch.device("cpu")) as loader:
                for step, shown in enumerate(steps):
                    batch = loader.get_batch(step)
                    n_targets[step].add(batch.n_targets)
                    for piece in batch.micro_batches:
                        assert piece.documents is not None
                        shown[piece.index] = [
                            *piece.inputs.tolist(),
                            *piece.targets.tolist(),
                            *piece.documents.tolist(),
                        ]
        orders.append(steps)
        for shown, counts in zip(steps, n_targets, strict=True):
            assert sorted(shown) == [0, 1, 2, 3]
            assert counts == {sum(target != IGNORED for row in shown.values() for target in row[1])}
    assert orders[0] == orders[1] == orders[2]


@pytest.mark.parametrize("kind", KINDS)
def test_get_batch_of_a_distant_step(sequences: dict[str, Sequences], kind: str) -> None:
    plan = BatchPlan(micro_batch_size=2, block_size=BLOCK, world_size=1, grad_accum_steps=2)
    with DataLoader(sequences[kind], plan, rank=0, device=torch.device("cpu")) as loader:
        far = loader.get_batch(10**12 // 4)
    rows = sequences[kind].read(10**12, 4)
    assert torch.cat([piece.inputs for piece in far.micro_batches]).tolist() == rows.inputs.tolist()
    assert far.n_targets == (rows.targets != IGNORED).sum()


def test_batches_have_no_documents_without_a_document_mask(stream: TokenStream) -> None:
    assert [batch.documents for batch in load_batches(stream, [0])[0]] == [None] * 4


def test_quarantined_batch_is_left_out_even_if_it_was_fetched_ahead(stream: TokenStream) -> None:
    expected = [[batch.inputs.tolist() for batch in step] for step in load_batches(stream, list(range(8)))]
    plan = BatchPlan(micro_batch_size=2, block_size=BLOCK, world_size=1, grad_accum_steps=4)
    windows, quarantine = Windows(stream, BLOCK, seed=1, document_mask=False), Quarantine([1])
    with DataLoader(windows, plan, rank=0, device=torch.device("cpu"), quarantine=quarantine) as loader:

        def read(step: int) -> list[list[list[int]]]:
            return [batch.inputs.tolist() for batch in loader.get_batch(step).micro_batches]

        assert [read(step) for step in range(3)] == [expected[0], expected[2], expected[3]]
        quarantine.add(4)
        assert [read(step) for step in (3, 4, 1)] == [expected[5], expected[6], expected[2]]
