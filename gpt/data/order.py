"""The order of training: which tokens sequence s of a run consists of, as a pure function of (seed, s).

Nothing is drawn and nothing is stored. An epoch is shuffled by a keyed permutation that is evaluated only where it is
needed, in O(1) time and memory per sequence. So a run can start at any position of a corpus of any size at once, and
neither a restart nor another number of processes can change the order.

    sequence s  ->  source                 Mixture: which source, if sources have weights
                ->  epoch, index in it     divmod(s, sequences per epoch); of a source, its own count of sequences
                ->  shuffled index         permute, with a key for each epoch
                ->  start in the tokens    window_starts: index * block_size + the epoch's offset
"""

import math
from collections.abc import Iterator, Sequence

import numpy as np
import numpy.typing as npt

from gpt.configs.run_plan import count_windows
from gpt.utils.helper import Purpose, random_bits

FEISTEL_ROUNDS = 8

Indices = npt.NDArray[np.uint64]


def permute(indices: Indices, n: int, key: int) -> Indices:
    """Map each index by the permutation of range(n) that `key` selects.

    The permutation is a Feistel network with cycle-walking (Black and Rogaway 2002, "Ciphers with arbitrary finite
    domains"). An index is a cell (row, column) of a grid of a x b >= n cells:

        index = row * b + column            a = ceil(sqrt(n)), b = ceil(n / a)
        even rounds:  row    = (row    + hash(column, key of the round)) mod a
        odd rounds:   column = (column + hash(row,    key of the round)) mod b

    Each round can be undone, so the network permutes the cells. The grid has fewer than b cells too many; an index that
    lands on one of them goes through the network again until it lands in range(n) (cycle-walking), which is rare.

    Args:
        indices: any part of range(n), in any order.
        n: size of the permutation.
        key: selects the permutation.

    A whole permutation of 10 numbers, and the same two of its values computed by themselves:

    >>> permute(np.arange(10, dtype=np.uint64), n=10, key=7).tolist()
    [5, 7, 1, 4, 6, 0, 8, 3, 2, 9]
    >>> permute(np.array([3, 4], dtype=np.uint64), n=10, key=7).tolist()
    [4, 6]
    """
    a = math.isqrt(n - 1) + 1
    b = -(-n // a)
    keys = [np.uint64(random_bits(key, round_)) for round_ in range(FEISTEL_ROUNDS)]
    values = _apply_feistel(indices.astype(np.uint64), a, b, keys)
    while (outside := values >= n).any():
        values[outside] = _apply_feistel(values[outside], a, b, keys)
    return values


def _apply_feistel(values: Indices, a: int, b: int, keys: list[np.uint64]) -> Indices:
    rows, columns = np.divmod(values, np.uint64(b))
    for round_, key in enumerate(keys):
        if round_ % 2:
            columns = (columns + _hash(rows, key)) % np.uint64(b)
        else:
            rows = (rows + _hash(columns, key)) % np.uint64(a)
    return rows * np.uint64(b) + columns


def _hash(values: Indices, key: np.uint64) -> Indices:
    """Return 32 well-mixed bits of each value: few enough that the sum with a coordinate cannot overflow."""
    mixed = (values ^ key) * np.uint64(0x9E3779B97F4A7C15)
    mixed = (mixed ^ (mixed >> np.uint64(32))) * np.uint64(0xD6E8FEB86659FD93)
    return mixed >> np.uint64(32)


def shuffle_epochs(
    seed: int, first: int, count: int, per_epoch: int
) -> Iterator[tuple[slice, int, npt.NDArray[np.int64]]]:
    """Shuffle sequences `first` ... `first + count - 1` of a run, by a new permutation in each epoch.

    Yields:
        for each epoch that the range touches: the part of the range, the epoch, and the shuffled indices, each in
        range(per_epoch).

    Epochs of 4 sequences; the range of 6 begins in the middle of epoch 0:

    >>> for part, epoch, indices in shuffle_epochs(seed=0, first=2, count=6, per_epoch=4):
    ...     print(part.start, part.stop, epoch, indices.tolist())
    0 2 0 [3, 0]
    2 6 1 [1, 3, 0, 2]
    """
    done = 0
    while done < count:
        epoch, index = divmod(first + done, per_epoch)
        n = min(count - done, per_epoch - index)
        indices = np.arange(index, index + n, dtype=np.uint64)
        yield (
            slice(done, done + n),
            epoch,
            permute(indices, per_epoch, random_bits(seed, Purpose.ORDER, epoch)).astype(np.int64),
        )
        done += n


def window_starts(seed: int, first: int, count: int, n_tokens: int, block_size: int) -> npt.NDArray[np.int64]:
    """Return where windows `first` ... `first + count - 1` of a run start in a stream of `n_tokens`.

        epoch, index = divmod(s, windows_per_epoch)
        start(s)     = permutation_of_epoch(index) * block_size + offset_of_epoch

    The windows of an epoch do not overlap. The offset, below `block_size`, is new in each epoch, and shows the model
    other contexts.

    33 tokens in windows of 8 (and one more token, the last target) make 3 windows in each epoch. Epoch 0 has the offset
    6 and the order 1, 2, 0; epoch 1 the offset 1 and the order 1, 2, 0; epoch 2 the offset 6 and the order 1, 0, 2:

    >>> window_starts(seed=0, first=0, count=9, n_tokens=33, block_size=8).tolist()
    [14, 22, 6, 9, 17, 1, 14, 6, 22]

    Any part can be computed by itself:

    >>> window_starts(seed=0, first=4, count=2, n_tokens=33, block_size=8).tolist()
    [17, 1]
    """
    per_epoch = count_windows(n_tokens, block_size)
    max_offset = min(block_size - 1, n_tokens - 1 - per_epoch * block_size)
    starts = np.empty(count, dtype=np.int64)
    for part, epoch, windows in shuffle_epochs(seed, first, count, per_epoch):
        starts[part] = windows * block_size + random_bits(seed, Purpose.OFFSET, epoch) % (max_offset + 1)
    return starts


class Mixture:
    """Source of each sequence of a run: any part of the run has the shares that the weights ask for.

    Imagine a circle of length M = 2^32, cut into one arc for each source, as long as its share. Sequence s is the point

        x(s) = (start + s * STEP) mod M         STEP = M / golden ratio, rounded to an odd number

    and its source is the arc in which the point lies. Multiples of the golden ratio spread over a circle as evenly as
    any sequence can (Knuth, The Art of Computer Programming 3, section 6.4, theorem S), so the counts of any part of
    the run are right to within a few sequences. `start` depends on the seed.

    With weights 3 and 1 every fourth sequence or so comes from source 1, and counting needs no loop:

    >>> mixture = Mixture(weights=(3, 1), seed=0)
    >>> mixture.choose_sources(first=0, count=12).tolist()
    [0, 0, 1, 0, 0, 0, 0, 1, 0, 0, 1, 0]
    >>> mixture.count(source=1, n=12), mixture.count(source=1, n=10**12)
    (3, 249999999999)

    Args:
        weights: share of each source, in any unit.
        seed: of the run.
    """

    M = 2**32
    STEP = 2654435769

    def __init__(self, weights: Sequence[float], seed: int):
        ends = np.cumsum(weights) / sum(weights) * self.M
        self._borders = [0, *(round(end) for end in ends[:-1]), self.M]
        self._start = random_bits(seed, Purpose.MIXTURE) % self.M

    def choose_sources(self, first: int, count: int) -> npt.NDArray[np.int64]:
        """Return the source of each of the sequences `first` ... `first + count - 1`."""
        numbers = np.arange(first, first + count, dtype=np.uint64)
        points = (numbers * np.uint64(self.STEP) + np.uint64(self._start)) % np.uint64(self.M)
        return np.searchsorted(np.array(self._borders[1:-1], dtype=np.uint64), points, side="right")

    def count(self, source: int, n: int) -> int:
        """Count the sequences of a source among the first `n` of the run, in O(log M)."""
        return self._count_before(self._borders[source + 1], n) - self._count_before(self._borders[source], n)

    def _count_before(self, border: int, n: int) -> int:
        """Count the points x(0) ... x(n - 1) that lie before `border`.

        For any integer y, floor(y / M) - floor((y - border) / M) is 1 if y mod M < border, else 0. Sum it over
        y = start + s * STEP.
        """
        all_turns = _floor_sum(n, self.M, self.STEP, self._start)
        return all_turns - _floor_sum(n, self.M, self.STEP, self._start - border)


def _floor_sum(n: int, m: int, a: int, b: int) -> int:
    """Sum floor((a * i + b) / m) over i in range(n), in O(log m) steps, as in Euclid's algorithm.

    Graham, Knuth, Patashnik, Concrete Mathematics, section 3.5: the lattice points below a line.
    """
    total = 0
    while n > 0:
        total += n * (n - 1) // 2 * (a // m) + n * (b // m)
        a, b = a % m, b % m
        n, b, m, a = (a * n + b) // m, (a * n + b) % m, a, m  # the same points, counted along the other axis
    return total
