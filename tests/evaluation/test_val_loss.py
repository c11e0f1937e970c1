import math
from collections.abc import Mapping
from contextlib import nullcontext
from itertools import pairwise

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from gpt.configs.gpt_config import GPTConfig
from gpt.data.shards import TokenStream
from gpt.evaluation.val_loss import ValLoss
from gpt.models.gpt import GPT
from gpt.utils.distributed import DistContext
from tests.conftest import write_stream

BLOCK, N_TOKENS, N_BYTES = 8, 203, 950
MODEL = GPT(GPTConfig(n_layer=1, n_head=1, n_embd=16, block_size=BLOCK, vocab_size=30), seed=0).eval()


class Rank(DistContext):
    """One of several ranks, whose sums the test collects."""

    def __init__(self, rank: int, world_size: int):
        super().__init__("cpu")
        self.rank, self.world_size, self.sums = rank, world_size, list[float]()
        self.others: list[list[float]] = []

    def sum_on_host(self, values: list[float]) -> list[float]:
        self.sums = values
        if self.others:
            return [sum(numbers) for numbers in zip(*self.others, strict=True)]
        return [max(value, 1) for value in values]


@pytest.fixture(scope="module")
def stream(tmp_path_factory: pytest.TempPathFactory) -> TokenStream:
    ids = np.random.default_rng(0).integers(0, 30, N_TOKENS)
    return write_stream(tmp_path_factory.mktemp("val"), [(ids, N_BYTES)])


def task(
    stream: TokenStream | Mapping[str, TokenStream], batches: int = 0, dist: DistContext | None = None,
    batch_size: int = 3, *, masked: bool = False,
) -> ValLoss:  # fmt: skip
    return ValLoss(
        {"text": stream} if isinstance(stream, TokenStream) else stream,
        block_size=BLOCK, batch_size=batch_size, batches=batches, document_mask=masked,
        autocast=nullcontext, dist=dist or DistContext("cpu"),
    )  # fmt: skip


def reference(stream: TokenStream) -> float:
    """Return the loss computed window by window, without batches or padding."""
    tokens = torch.from_numpy(stream.read(0, N_TOKENS).astype("int64"))
    nats = 0.0
    for start in range(0, N_TOKENS - 1, BLOCK):
        window = tokens[start : start + BLOCK + 1]
        logits = MODEL(window[None, :-1])[0]
        nats += F.cross_entropy(logits.double(), window[1:], reduction="sum").item()
    return nats / (N_TOKENS - 1)


@pytest.mark.parametrize("batch_size", [1, 3, 7, 100])
def test_loss_is_the_same_at_every_batch_size(stream: TokenStream, batch_size: int) -> None:
    metrics = task(stream, batch_size=batch_size).run(MODEL)
    assert metrics["val/loss"] == pytest.approx(reference(stream), abs=1e-6)


def test_perplexity_and_bits_per_byte_follow_from_the_loss(stream: TokenStream) -> None:
    metrics = task(stream).run(MODEL)
    assert metrics["val/perplexity"] == pytest.approx(math.exp(metrics["val/loss"]))
    total_bits = metrics["val/loss"] / math.log(2) * (N_TOKENS - 1)
    assert metrics["val/bpb"] == pytest.approx(total_bits / N_BYTES)


@pytest.mark.parametrize("world_size", [2, 3, 16])
def test_ranks_share_the_batches_and_get_the_result_of_one_rank(stream: TokenStream, world_size: int) -> None:
    ranks = [Rank(rank, world_size) for rank in range(world_size)]
    for rank in ranks:
        task(stream, dist=rank).run(MODEL)
    assert sum(rank.sums[-1] for rank in ranks) == N_TOKENS - 1
    ranks[0].others = [rank.sums for rank in ranks]
    assert task(stream, dist=ranks[0]).run(MODEL) == task(stream).run(MODEL)


def test_fewer_batches_are_spread_evenly_and_always_the_same(stream: TokenStream) -> None:
    some = task(stream, batches=4)
    read: list[int] = []
    some._get_batch = lambda stream, index: read.append(index) or ValLoss._get_batch(some, stream, index)  # type: ignore
    some.run(MODEL)
    assert read == [0, 2, 4, 6]
    assert some.run(MODEL) == some.run(MODEL) != task(stream).run(MODEL)
    assert task(stream, batches=1000).run(MODEL) == task(stream).run(MODEL)


@pytest.fixture(scope="module")
def several(tmp_path_factory: pytest.TempPathFactory) -> dict[str, TokenStream]:
    """Write sources of 60, 203 and 9 tokens in documents of several lengths, across shards."""
    generator = np.random.default_rng(1)
    lengths = {"books": (20, 1, 2, 17, 20), "code": (100, 3, 7, 8, 9, 26, 50), "web": (9,)}
    return {
        name: write_stream(
            tmp_path_factory.mktemp(name), [(generator.integers(0, 30, n), 4 * n) for n in sizes], per_shard=3
        )
        for name, sizes in lengths.items()
    }


def nats_of_windows(stream: TokenStream, *, masked: bool) -> float:
    """Return the nats computed window by window; with `masked`, document by document."""
    tokens = torch.from_numpy(stream.read(0, len(stream)).astype("int64"))
    begins = set(stream.find_document_starts(0, len(stream)).tolist())
    nats = 0.0
    for start in range(0, len(tokens) - 1, BLOCK):
        stop = min(start + BLOCK, len(tokens) - 1)
        cuts = [start, *(at for at in range(start + 1, stop) if masked and at in begins), stop]
        for first, last in pairwise(cuts):
            logits = MODEL(tokens[None, first:last])[0]
            nats += F.cross_entropy(logits.double(), tokens[first + 1 : last + 1], reduction="sum").item()
    return nats


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("batch_size", [1, 3, 100])
def test_each_source_and_all_together_have_a_loss(
    several: dict[str, TokenStream], masked: bool, batch_size: int
) -> None:
    metrics = task(several, batch_size=batch_size, masked=masked).run(MODEL)
    nats = {name: nats_of_windows(stream, masked=masked) for name, stream in several.items()}
    targets = {name: len(stream) - 1 for name, stream in several.items()}
    assert metrics.keys() == {"val/loss", "val/perplexity", "val/bpb", *(f"val/loss/{name}" for name in several)}
    for name, stream_nats in nats.items():
        assert metrics[f"val/loss/{name}"] == pytest.approx(stream_nats / targets[name], abs=1e-6)
    assert metrics["val/loss"] == pytest.approx(sum(nats.values()) / sum(targets.values()), abs=1e-6)
    n_bytes = 4 * (sum(targets.values()) + len(several))
    assert metrics["val/bpb"] == pytest.approx(sum(nats.values()) / math.log(2) / n_bytes, abs=1e-6)


def test_document_mask_changes_the_loss_unless_there_is_one_document(several: dict[str, TokenStream]) -> None:
    plain, masked = (task(several, masked=flag).run(MODEL) for flag in (False, True))
    assert plain["val/loss/books"] != masked["val/loss/books"]
    assert plain["val/loss/web"] == pytest.approx(masked["val/loss/web"], abs=1e-6)


def test_single_source_has_no_loss_by_name(several: dict[str, TokenStream]) -> None:
    metrics = task({"web": several["web"]}).run(MODEL)
    assert metrics.keys() == {"val/loss", "val/perplexity", "val/bpb"}
    assert metrics["val/loss"] == task(several).run(MODEL)["val/loss/web"]


def test_sources_are_weighted_by_their_sizes_when_few_batches_are_read(several: dict[str, TokenStream]) -> None:
    """Check that a source counts by its tokens, not by those that were evaluated."""
    metrics = task(several, batches=1, batch_size=1).run(MODEL)
    sizes = {name: len(stream) - 1 for name, stream in several.items()}
    expected = sum(metrics[f"val/loss/{name}"] * size for name, size in sizes.items()) / sum(sizes.values())
    assert metrics["val/loss"] == pytest.approx(expected, abs=1e-9)


@pytest.mark.parametrize("world_size", [2, 3, 16])
@pytest.mark.parametrize("batches", [0, 2])
def test_ranks_share_every_source(several: dict[str, TokenStream], world_size: int, batches: int) -> None:
    expected = task(several, batches, masked=True).run(MODEL)
    ranks = [Rank(rank, world_size) for rank in range(world_size)]
    for rank in ranks:
        task(several, batches, rank, masked=True).run(MODEL)
    ranks[-1].others = [rank.sums for rank in ranks]
    assert task(several, batches, ranks[-1], masked=True).run(MODEL) == expected


def test_ranks_call_the_model_equally_often(stream: TokenStream) -> None:
    calls = [0, 0]
    for rank in range(2):

        def count(*tensors: torch.Tensor, rank: int = rank) -> torch.Tensor:
            calls[rank] += 1
            return MODEL(*tensors)

        model = torch.nn.Module()
        model.forward = count  # type: ignore[assignment]
        task(stream, batches=3, dist=Rank(rank, 2)).run(model)
    assert calls == [2, 2]


def test_gpu_copies_batches_from_pinned_memory(stream: TokenStream, monkeypatch: pytest.MonkeyPatch) -> None:
    copies: list[bool] = []
    plain_to = torch.Tensor.to

    def to(tensor: torch.Tensor, device: object, *, non_blocking: bool = False) -> torch.Tensor:
        copies.append(non_blocking and getattr(tensor, "is_pinned_copy", False))
        return tensor

    def pin_memory(tensor: torch.Tensor) -> torch.Tensor:
        pinned = tensor.clone()
        pinned.is_pinned_copy = True  # type: ignore[attr-defined]
        return pinned

    validation = task(stream)
    validation._dist.device = torch.device("cuda")
    with monkeypatch.context() as patch:
        patch.setattr(torch.Tensor, "pin_memory", pin_memory)
        patch.setattr(torch.Tensor, "to", to)
        tensors = [validation._to_device(tensor) for tensor in validation._get_batch(stream, 0)]
    assert copies == [True] * len(tensors) == [True, True]
    assert torch.Tensor.to is plain_to
