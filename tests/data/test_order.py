import doctest
import random
import time
import tracemalloc

import numpy as np
import pytest

from gpt.configs.run_plan import count_windows
from gpt.data import order
from gpt.data.order import Mixture, _floor_sum, permute, shuffle_epochs, window_starts


def test_worked_examples() -> None:
    results = doctest.testmod(order)
    assert results.attempted >= 8
    assert results.failed == 0


@pytest.mark.parametrize("n", [1, 2, 3, 10, 97, 1000, 4096, 10_007])
def test_permute_is_a_bijection_for_every_size(n: int) -> None:
    for key in (0, 1, 2**64 - 1):
        assert sorted(permute(np.arange(n, dtype=np.uint64), n, key).tolist()) == list(range(n))


def test_permute_of_a_part_is_that_part_of_the_permutation() -> None:
    permutation = permute(np.arange(1000, dtype=np.uint64), 1000, 5)
    assert permute(np.arange(300, 400, dtype=np.uint64), 1000, 5).tolist() == permutation[300:400].tolist()


def test_permutations_look_random() -> None:
    """Check over keys that each index lands on each place equally often, and neighbours do not stay together."""
    n, keys = 12, 6000
    places = np.stack([permute(np.arange(n, dtype=np.uint64), n, key) for key in range(keys)]).astype(int)
    for index in range(n):
        counts = np.bincount(places[:, index], minlength=n)
        chi_squared = float(((counts - keys / n) ** 2 / (keys / n)).sum())
        assert chi_squared < 35  # 11 degrees of freedom: 31.3 is the 0.1% quantile
    steps = np.diff(permute(np.arange(10_000, dtype=np.uint64), 10_000, 3).astype(int))
    assert np.mean(steps == 1) < 0.002
    assert abs(np.corrcoef(np.arange(9999), steps)[0, 1]) < 0.05


@pytest.mark.parametrize(("n_tokens", "block_size"), [(1000, 16), (33, 16), (32, 16), (17, 16), (64, 1)])
def test_every_window_appears_once_per_epoch_inside_the_stream(n_tokens: int, block_size: int) -> None:
    per_epoch = count_windows(n_tokens, block_size)
    for epoch in range(5):
        starts = np.sort(window_starts(3, epoch * per_epoch, per_epoch, n_tokens, block_size))
        assert np.all(np.diff(starts) == block_size)
        assert starts[0] >= 0
        assert starts[-1] + block_size + 1 <= n_tokens
        assert starts[0] < block_size


def test_epochs_differ_in_order_and_offset() -> None:
    per_epoch = count_windows(1000, 16)
    epochs = [window_starts(3, epoch * per_epoch, per_epoch, 1000, 16) for epoch in range(8)]
    assert len({tuple(starts) for starts in epochs}) == 8
    assert len({min(starts) for starts in epochs}) > 3


def test_any_range_of_windows_is_that_range_of_the_run() -> None:
    stream = window_starts(1, 0, 500, 1000, 16)
    for first in (0, 1, 59, 60, 61, 250):
        assert window_starts(1, first, 130, 1000, 16).tolist() == stream[first : first + 130].tolist()


def test_seed_decides_the_order() -> None:
    assert window_starts(1, 0, 50, 1000, 16).tolist() != window_starts(2, 0, 50, 1000, 16).tolist()


def test_seek_in_ten_trillion_tokens_takes_constant_time() -> None:
    begun = time.perf_counter()
    starts = window_starts(1, 9 * 10**9, 1000, 10**13, 1024)
    assert time.perf_counter() - begun < 1  # reading an index of that size would take minutes
    assert len(set(starts.tolist())) == 1000
    assert starts.max() < 10**13


def test_seek_takes_constant_memory() -> None:
    tracemalloc.start()
    starts = window_starts(1, 10**12, 64, 10**15, 512)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert len(set(starts.tolist())) == 64
    assert peak < 2**20  # an index of that corpus has 2 * 10**12 entries


def test_shuffle_epochs_permutes_each_epoch_anew() -> None:
    """Read 40 of 7 sequences per epoch from the fifth on: pieces of any size give the same."""
    pieces = list(shuffle_epochs(3, 5, 40, 7))
    assert [epoch for _, epoch, _ in pieces] == [0, 1, 2, 3, 4, 5, 6]
    assert [(place.start, place.stop) for place, _, _ in pieces] == [
        *((0, 2), (2, 9), (9, 16), (16, 23), (23, 30), (30, 37), (37, 40)),
    ]
    assert all(sorted(numbers) == list(range(7)) for _, _, numbers in pieces[1:-1])
    assert len({tuple(numbers) for _, _, numbers in pieces[1:-1]}) == 5
    assert [next(iter(shuffle_epochs(3, 5 + at, 1, 7)))[2][0] for at in range(40)] == np.concatenate(
        [numbers for _, _, numbers in pieces]
    ).tolist()


WEIGHTS = [(0.7, 0.2, 0.1), (0.99, 0.01), (1,) * 10, (1, 1, 1), (5, 3), (0.5, 0.5), (2,), (1e-3, 1e3)]


@pytest.mark.parametrize("weights", WEIGHTS)
@pytest.mark.parametrize("base", [0, 123_457, 2**32 - 9_999, 10**12 - 12_345])
def test_any_ten_thousand_sequences_have_the_shares_of_the_weights(weights: tuple[float, ...], base: int) -> None:
    """Check a bound of four sequences, where a hundredth is promised."""
    for seed in (0, 1):
        chosen = Mixture(weights, seed).choose_sources(base, 30_000)
        for source, weight in enumerate(weights):
            so_far = np.concatenate([[0], np.cumsum(chosen == source)])
            counts = so_far[10_000:] - so_far[:-10_000]  # of every stretch, wherever it begins
            assert np.abs(counts - 10_000 * weight / sum(weights)).max() < 4


@pytest.mark.parametrize("weights", WEIGHTS)
def test_mixture_count_equals_counting_one_by_one(weights: tuple[float, ...]) -> None:
    draw = random.Random(0)
    for seed in range(5):
        mixture = Mixture(weights, seed)
        chosen = mixture.choose_sources(0, 20_000)
        for n in [0, 1, 2, *(draw.randrange(20_000) for _ in range(20))]:
            expected = np.bincount(chosen[:n], minlength=len(weights)).tolist()
            assert [mixture.count(source, n) for source in range(len(weights))] == expected


@pytest.mark.parametrize("first", [10**9, 2**32, 10**13, 2**60])
def test_mixture_count_is_exact_at_any_distance(first: int) -> None:
    mixture = Mixture((0.7, 0.2, 0.1), 5)
    before = [mixture.count(source, first) for source in range(3)]
    after = [mixture.count(source, first + 5000) for source in range(3)]
    assert sum(before) == first
    assert np.array(before) / first == pytest.approx([0.7, 0.2, 0.1], abs=1e-8)
    assert np.subtract(after, before).tolist() == np.bincount(mixture.choose_sources(first, 5000)).tolist()


def test_point_on_a_border_belongs_to_the_next_source() -> None:
    mixture = Mixture((1, 1), 0)
    for start, source in ((0, 0), (2**31 - 1, 0), (2**31, 1), (2**32 - 1, 1)):
        mixture._start = start
        assert mixture.choose_sources(0, 1).tolist() == [source]
        assert (mixture.count(source, 1), mixture.count(1 - source, 1)) == (1, 0)


def test_mixture_depends_on_weights_and_seed_alone() -> None:
    def choose(weights: tuple[float, ...], seed: int) -> list[int]:
        return Mixture(weights, seed).choose_sources(0, 200).tolist()

    assert choose((3, 1), 1) == choose((3, 1), 1) == choose((0.75, 0.25), 1)
    assert choose((3, 1), 1) != choose((3, 1), 2)
    assert choose((3, 1), 1) != choose((1, 3), 1)
    assert Mixture((3, 1), 1).choose_sources(37, 50).tolist() == choose((3, 1), 1)[37:87]


def test_floor_sum_equals_summing_floors() -> None:
    draw = random.Random(0)
    for _ in range(2000):
        n, m, a, b = draw.randrange(40), draw.randrange(1, 50), draw.randrange(120), draw.randrange(-200, 200)
        assert _floor_sum(n, m, a, b) == sum((a * i + b) // m for i in range(n)), (n, m, a, b)
