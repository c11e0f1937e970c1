"""The order of training: which tokens the n-th sequence of a run consists of, a pure function of (seed, n).

Nothing is drawn and nothing is stored: a keyed permutation of the epoch's windows is evaluated where it is asked, in
O(1), so any position of any corpus is found at once, and no process count or restart can change the order.
"""

import math

import numpy as np
import numpy.typing as npt

from gpt.configs.run_plan import windows_per_epoch
from gpt.utils.helper import Purpose, draw

ROUNDS = 8

Indices = npt.NDArray[np.uint64]


def permute(indices: Indices, n: int, key: int) -> Indices:
    """A bijection of range(n) that `key` selects, applied to each index.

    A Feistel network over a grid of a x b >= n cells, each round adding a hash of one coordinate to the other
    (Black and Rogaway 2002, "Ciphers with arbitrary finite domains"); what lands outside range(n) is sent through
    again. The grid has fewer than b cells too many, so that is rare.
    """
    a = math.isqrt(n - 1) + 1
    b = -(-n // a)
    keys = [np.uint64(draw(key, round_)) for round_ in range(ROUNDS)]
    values = _feistel(indices.astype(np.uint64), a, b, keys)
    while (outside := values >= n).any():
        values[outside] = _feistel(values[outside], a, b, keys)
    return values


def _feistel(values: Indices, a: int, b: int, keys: list[np.uint64]) -> Indices:
    rows, columns = np.divmod(values, np.uint64(b))
    for round_, key in enumerate(keys):
        if round_ % 2:
            columns = (columns + _hash(rows, key)) % np.uint64(b)
        else:
            rows = (rows + _hash(columns, key)) % np.uint64(a)
    return rows * np.uint64(b) + columns


def _hash(values: Indices, key: np.uint64) -> Indices:
    """32 well-mixed bits, so that adding a coordinate cannot overflow."""
    mixed = (values ^ key) * np.uint64(0x9E3779B97F4A7C15)
    mixed = (mixed ^ (mixed >> np.uint64(32))) * np.uint64(0xD6E8FEB86659FD93)
    return mixed >> np.uint64(32)


def window_starts(seed: int, first: int, count: int, n_tokens: int, block_size: int) -> npt.NDArray[np.int64]:
    """Where sequences `first` ... `first + count - 1` of a run begin in the token stream.

    Sequence s lies in epoch s // windows_per_epoch, at a place that the epoch's permutation gives it. An epoch's
    windows do not overlap, and begin at an offset below `block_size` that is drawn anew, so that later epochs show
    the model other contexts.
    """
    per_epoch = windows_per_epoch(n_tokens, block_size)
    spare = min(block_size - 1, n_tokens - 1 - per_epoch * block_size)
    starts = np.empty(count, dtype=np.int64)
    done = 0
    while done < count:  # one turn per epoch that the range touches
        epoch, index = divmod(first + done, per_epoch)
        turn = min(count - done, per_epoch - index)
        indices = np.arange(index, index + turn, dtype=np.uint64)
        windows = permute(indices, per_epoch, draw(seed, Purpose.ORDER, epoch)).astype(np.int64)
        starts[done : done + turn] = windows * block_size + draw(seed, Purpose.OFFSET, epoch) % (spare + 1)
        done += turn
    return starts
