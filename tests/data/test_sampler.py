import time

import numpy as np
import pytest

from gpt.configs.run_plan import windows_per_epoch
from gpt.data.sampler import permute, window_starts


@pytest.mark.parametrize("n", [1, 2, 3, 10, 97, 1000, 4096, 10_007])
def test_permute_is_a_bijection_for_every_size(n: int) -> None:
    for key in (0, 1, 2**64 - 1):
        assert sorted(permute(np.arange(n, dtype=np.uint64), n, key).tolist()) == list(range(n))


def test_a_part_of_the_permutation_is_that_part_of_the_whole() -> None:
    whole = permute(np.arange(1000, dtype=np.uint64), 1000, 5)
    assert permute(np.arange(300, 400, dtype=np.uint64), 1000, 5).tolist() == whole[300:400].tolist()


def test_permutations_look_random() -> None:
    """Over keys, each index lands on each place equally often, and neighbours do not stay together."""
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
def test_every_window_comes_once_per_epoch_and_lies_in_the_text(n_tokens: int, block_size: int) -> None:
    per_epoch = windows_per_epoch(n_tokens, block_size)
    for epoch in range(5):
        starts = np.sort(window_starts(3, epoch * per_epoch, per_epoch, n_tokens, block_size))
        assert np.all(np.diff(starts) == block_size)
        assert starts[0] >= 0
        assert starts[-1] + block_size + 1 <= n_tokens
        assert starts[0] < block_size


def test_epochs_differ_in_order_and_offset() -> None:
    per_epoch = windows_per_epoch(1000, 16)
    epochs = [window_starts(3, epoch * per_epoch, per_epoch, 1000, 16) for epoch in range(8)]
    assert len({tuple(starts) for starts in epochs}) == 8
    assert len({min(starts) for starts in epochs}) > 3


def test_any_stretch_is_that_stretch_of_the_stream_across_epochs() -> None:
    stream = window_starts(1, 0, 500, 1000, 16)
    for first in (0, 1, 59, 60, 61, 250):
        assert window_starts(1, first, 130, 1000, 16).tolist() == stream[first : first + 130].tolist()


def test_the_seed_decides_the_order() -> None:
    assert window_starts(1, 0, 50, 1000, 16).tolist() != window_starts(2, 0, 50, 1000, 16).tolist()


def test_any_position_of_a_ten_trillion_token_corpus_is_found_at_once() -> None:
    begun = time.perf_counter()
    starts = window_starts(1, 9 * 10**9, 1000, 10**13, 1024)
    assert time.perf_counter() - begun < 1  # reading an index of that size would take minutes
    assert len(set(starts.tolist())) == 1000
    assert starts.max() < 10**13
