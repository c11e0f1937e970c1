"""The order of training: which tokens the n-th sequence of a run consists of, a pure function of (seed, n).

Nothing is drawn and nothing is stored: a keyed permutation of the epoch's sequences is evaluated where it is asked, in
O(1), so any position of any corpus is found at once, and no process count or restart can change the order. Which
source of a mixture a sequence comes from is computed in the same way.
"""

import math
from collections.abc import Iterator, Sequence

import numpy as np
import numpy.typing as npt

from gpt.configs.run_plan import count_windows
from gpt.utils.helper import Purpose, random_bits

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
    keys = [np.uint64(random_bits(key, round_)) for round_ in range(ROUNDS)]
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


def shuffled(seed: int, first: int, count: int, per_epoch: int) -> Iterator[tuple[slice, int, npt.NDArray[np.int64]]]:
    """What sequences `first` ... `first + count - 1` of a run are, in an order that is new in each epoch.

    Yields:
        for each epoch that the range touches: where in the range, the epoch, and which of its `per_epoch` sequences.
    """
    done = 0
    while done < count:
        epoch, index = divmod(first + done, per_epoch)
        turn = min(count - done, per_epoch - index)
        indices = np.arange(index, index + turn, dtype=np.uint64)
        yield (
            slice(done, done + turn),
            epoch,
            permute(indices, per_epoch, random_bits(seed, Purpose.ORDER, epoch)).astype(np.int64),
        )
        done += turn


def window_starts(seed: int, first: int, count: int, n_tokens: int, block_size: int) -> npt.NDArray[np.int64]:
    """Where windows `first` ... `first + count - 1` of a run begin in the token stream.

    Window s lies in epoch s // windows_per_epoch, at a place that the epoch's permutation gives it. An epoch's
    windows do not overlap, and begin at an offset below `block_size` that is drawn anew, so that later epochs show
    the model other contexts.
    """
    per_epoch = count_windows(n_tokens, block_size)
    spare = min(block_size - 1, n_tokens - 1 - per_epoch * block_size)
    starts = np.empty(count, dtype=np.int64)
    for place, epoch, windows in shuffled(seed, first, count, per_epoch):
        starts[place] = windows * block_size + random_bits(seed, Purpose.OFFSET, epoch) % (spare + 1)
    return starts


class Mixture:
    """Which source each sequence of a run comes from, so that every stretch of the run has the weights' shares.

    Sequence s takes the source in whose share of the circle s steps of the golden ratio end, from a start that the seed
    gives: the sequence of least discrepancy (Knuth, The Art of Computer Programming 3, section 6.4, theorem S), by
    which the shares of any stretch are right to within a few sequences.
    """

    CIRCLE = 2**32
    STEP = 2654435769  # the odd number nearest to CIRCLE / the golden ratio

    def __init__(self, weights: Sequence[float], seed: int):
        ends = np.cumsum(weights) / sum(weights) * self.CIRCLE
        self._borders = [0, *(round(end) for end in ends[:-1]), self.CIRCLE]
        self._start = random_bits(seed, Purpose.MIXTURE) % self.CIRCLE

    def sources(self, first: int, count: int) -> npt.NDArray[np.int64]:
        """The source of sequences `first` ... `first + count - 1`."""
        steps = np.arange(first, first + count, dtype=np.uint64)
        places = (steps * np.uint64(self.STEP) + np.uint64(self._start)) % np.uint64(self.CIRCLE)
        return np.searchsorted(np.array(self._borders[1:-1], dtype=np.uint64), places, side="right")

    def count(self, source: int, n: int) -> int:
        """How many of the first `n` sequences are the source's."""
        return self._below(self._borders[source + 1], n) - self._below(self._borders[source], n)

    def _below(self, border: int, n: int) -> int:
        """How many of the first `n` places on the circle lie before `border`.

        x mod M < b just where floor(x / M) - floor((x - b) / M) is 1.
        """
        turns = _floor_sum(n, self.CIRCLE, self.STEP, self._start)
        return turns - _floor_sum(n, self.CIRCLE, self.STEP, self._start - border)


def _floor_sum(n: int, m: int, a: int, b: int) -> int:
    """The sum of floor((a * i + b) / m) over i in range(n), in O(log m) steps, as Euclid's algorithm goes.

    Graham, Knuth, Patashnik, Concrete Mathematics, section 3.5: the lattice points below a line.
    """
    total = 0
    while n > 0:
        total += n * (n - 1) // 2 * (a // m) + n * (b // m)
        a, b = a % m, b % m
        n, b, m, a = (a * n + b) // m, (a * n + b) % m, a, m  # the same points, counted along the other axis
    return total
