import math
from contextlib import nullcontext

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from gpt.configs.gpt_config import GPTConfig
from gpt.data.shards import TokenStream, write_shards
from gpt.evaluation.val_loss import ValLoss
from gpt.models.gpt import GPT
from gpt.utils.distributed import DistContext

BLOCK, N_TOKENS, N_BYTES = 8, 203, 950
MODEL = GPT(GPTConfig(n_layer=1, n_head=1, n_embd=16, block_size=BLOCK, vocab_size=30), seed=0).eval()


class Rank(DistContext):
    """A rank of several, whose sums are gathered by the test."""

    def __init__(self, rank: int, world_size: int):
        super().__init__("cpu")
        self.rank, self.world_size, self.given = rank, world_size, [0.0, 0.0]

    def sum_on_host(self, values: list[float]) -> list[float]:
        self.given = values
        return [values[0], max(values[1], 1)]


@pytest.fixture(scope="module")
def stream(tmp_path_factory: pytest.TempPathFactory) -> TokenStream:
    folder = tmp_path_factory.mktemp("val")
    ids = np.random.default_rng(0).integers(0, 30, N_TOKENS).astype(np.uint32)
    return TokenStream(folder, write_shards(folder, "val", [(ids, N_BYTES)], np.uint16))


def task(stream: TokenStream, batches: int = 0, dist: DistContext | None = None, batch_size: int = 3) -> ValLoss:
    return ValLoss(
        stream, N_BYTES, block_size=BLOCK, batch_size=batch_size, batches=batches, autocast=nullcontext,
        dist=dist or DistContext("cpu"),
    )  # fmt: skip


def reference(stream: TokenStream) -> float:
    """Window by window, no batch, no padding."""
    tokens = torch.from_numpy(stream.read(0, N_TOKENS).astype("int64"))
    nats = 0.0
    for start in range(0, N_TOKENS - 1, BLOCK):
        window = tokens[start : start + BLOCK + 1]
        logits = MODEL(window[None, :-1])[0]
        nats += F.cross_entropy(logits.double(), window[1:], reduction="sum").item()
    return nats / (N_TOKENS - 1)


@pytest.mark.parametrize("batch_size", [1, 3, 7, 100])
def test_every_token_counts_once_however_it_is_batched(stream: TokenStream, batch_size: int) -> None:
    metrics = task(stream, batch_size=batch_size).run(MODEL)
    assert metrics["val/loss"] == pytest.approx(reference(stream), abs=1e-6)


def test_perplexity_and_bits_per_byte_follow_from_the_loss(stream: TokenStream) -> None:
    metrics = task(stream).run(MODEL)
    assert metrics["val/perplexity"] == pytest.approx(math.exp(metrics["val/loss"]))
    total_bits = metrics["val/loss"] / math.log(2) * (N_TOKENS - 1)
    assert metrics["val/bpb"] == pytest.approx(total_bits / N_BYTES)


@pytest.mark.parametrize("world_size", [2, 3, 16])
def test_ranks_share_the_work_and_their_sums_are_the_whole(stream: TokenStream, world_size: int) -> None:
    ranks = [Rank(rank, world_size) for rank in range(world_size)]
    for rank in ranks:
        task(stream, dist=rank).run(MODEL)
    nats, counted = (sum(rank.given[i] for rank in ranks) for i in range(2))
    assert counted == N_TOKENS - 1
    assert nats / counted == pytest.approx(task(stream).run(MODEL)["val/loss"], abs=1e-9)


def test_fewer_batches_are_spread_over_the_set_and_fixed(stream: TokenStream) -> None:
    some = task(stream, batches=4)
    assert some._batches == [0, 2, 4, 6]
    assert some.run(MODEL) == some.run(MODEL) != task(stream).run(MODEL)
    assert task(stream, batches=1000).run(MODEL) == task(stream).run(MODEL)
