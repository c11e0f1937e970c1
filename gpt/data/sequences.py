"""Position in a run -> the sequences there: windows of a stream, packed documents, or a mixture of sources."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from gpt.data.order import Mixture, shuffled, window_starts
from gpt.data.packing import Packing
from gpt.data.shards import TokenStream
from gpt.utils.helper import IGNORED

STRETCH = 512
"""Windows whose places are computed together."""

Int64s = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Rows:
    """Some sequences, each (n, block_size) int64."""

    inputs: Int64s
    targets: Int64s
    """The token after each input; IGNORED where there is none to predict."""
    documents: Int64s | None
    """The number, within its sequence, of the document of each position; None where attention is not confined."""

    @classmethod
    def empty(cls, n: int, block_size: int, *, masked: bool) -> "Rows":
        """Room for `n` sequences."""
        shape = (n, block_size)
        return cls(np.empty(shape, np.int64), np.empty(shape, np.int64), np.zeros(shape, np.int64) if masked else None)


@dataclass(frozen=True)
class Piece:
    """A range of a token stream that a sequence is made of."""

    stream: TokenStream
    start: int
    length: int


class Sequences(Protocol):
    """The sequences of a run, in its order."""

    def read(self, first: int, count: int) -> Rows:
        """Sequences `first` ... `first + count - 1`."""
        ...

    def count_targets(self, first: int, count: int) -> int:
        """How many tokens they predict, found without reading them."""
        ...


class TracedSequences(Sequences, Protocol):
    """Sequences of which is known where they come from."""

    def pieces(self, first: int, count: int) -> list[list[Piece]]:
        """What the inputs of each are made of, padding aside."""
        ...


class Windows:
    """Windows of a token stream, shuffled anew in each epoch.

    Args:
        stream: the documents, one after the other.
        block_size: length of a window.
        seed: of the order.
        masked: whether to tell the documents apart.
    """

    def __init__(self, stream: TokenStream, block_size: int, *, seed: int, masked: bool):
        self._stream, self._block_size, self._seed, self._masked = stream, block_size, seed, masked
        self._stretch = lru_cache(2)(self._starts_of_stretch)

    def read(self, first: int, count: int) -> Rows:
        """Sequences `first` ... `first + count - 1`."""
        size = self._block_size
        rows = Rows.empty(count, size, masked=self._masked)
        for row, start in enumerate(self._starts(first, count)):
            tokens = self._stream.read(start, size + 1)
            rows.inputs[row], rows.targets[row] = tokens[:-1], tokens[1:]
            if rows.documents is not None:
                rows.documents[row] = document_numbers(self._stream, start, size)
        return rows

    def count_targets(self, first: int, count: int) -> int:
        """One for every position."""
        return count * self._block_size

    def pieces(self, first: int, count: int) -> list[list[Piece]]:
        """One each."""
        return [[Piece(self._stream, start, self._block_size)] for start in self._starts(first, count)]

    def _starts(self, first: int, count: int) -> list[int]:
        """Where windows begin; computed for a stretch of them at once, for it is the calls that take the time."""
        stretches = range(first // STRETCH, (first + count - 1) // STRETCH + 1)
        starts = [start for stretch in stretches for start in self._stretch(stretch)]
        skipped = first - stretches.start * STRETCH
        return starts[skipped : skipped + count]

    def _starts_of_stretch(self, index: int) -> list[int]:
        starts = window_starts(self._seed, index * STRETCH, STRETCH, len(self._stream), self._block_size)
        found: list[int] = starts.tolist()
        return found


class PackedDocuments:
    """Whole documents packed in sequences, which are shuffled anew in each epoch.

    Args:
        stream: the documents.
        packing: which of them make up each sequence.
        block_size: length of a sequence.
        seed: of the order.
        end_of_text: the id that the last document's last token predicts; None where there is no such token.
        masked: whether to tell the documents apart.
    """

    def __init__(
        self,
        stream: TokenStream,
        packing: Packing,
        block_size: int,
        *,
        seed: int,
        end_of_text: int | None,
        masked: bool,
    ):
        self._stream, self._packing, self._block_size, self._seed = stream, packing, block_size, seed
        self._end = np.array([0 if end_of_text is None else end_of_text])
        self._masked = masked

    def read(self, first: int, count: int) -> Rows:
        """Sequences `first` ... `first + count - 1`."""
        rows = Rows.empty(count, self._block_size, masked=self._masked)
        rows.inputs[:] = self._end
        rows.targets[:] = IGNORED
        for place, _, numbers in shuffled(self._seed, first, count, self._packing.n_rows):
            for row, number in enumerate(numbers.tolist(), place.start):
                self._fill(rows, row, number)
        return rows

    def count_targets(self, first: int, count: int) -> int:
        """Those of every piece in them."""
        sums = self._packing.target_sums
        return sum(
            int((sums[numbers + 1] - sums[numbers]).sum())
            for _, _, numbers in shuffled(self._seed, first, count, self._packing.n_rows)
        )

    def pieces(self, first: int, count: int) -> list[list[Piece]]:
        """Whole documents, or parts of those that are longer than a sequence."""
        packing = self._packing
        rows = [
            packing.row_offsets[number : number + 2].tolist()
            for _, _, numbers in shuffled(self._seed, first, count, packing.n_rows)
            for number in numbers.tolist()
        ]
        return [
            [Piece(self._stream, int(packing.starts[i]), int(packing.lengths[i])) for i in range(*row)] for row in rows
        ]

    def _fill(self, rows: Rows, row: int, number: int) -> None:
        packing, at = self._packing, 0
        first, last = packing.row_offsets[number : number + 2].tolist()
        for index, piece in enumerate(range(first, last)):
            length, n_targets = int(packing.lengths[piece]), int(packing.targets[piece])
            tokens = self._with_next(int(packing.starts[piece]), length)
            rows.inputs[row, at : at + length] = tokens[:-1]
            rows.targets[row, at : at + n_targets] = tokens[1 : n_targets + 1]
            if rows.documents is not None:
                rows.documents[row, at:] = index
            at += length
        if rows.documents is not None and at < self._block_size:
            rows.documents[row, at:] = last - first

    def _with_next(self, start: int, length: int) -> npt.NDArray[np.integer[Any]]:
        """A piece and the token after it."""
        if start + length < len(self._stream):
            return self._stream.read(start, length + 1)
        return np.concatenate([self._stream.read(start, length), self._end])


class MixedSources:
    """Sequences of several sources, in the shares that weights give them.

    Args:
        sources: the sequences of each.
        mixture: which of them comes when.
    """

    def __init__(self, sources: Sequence[TracedSequences], mixture: Mixture):
        self._sources, self._mixture = sources, mixture

    def read(self, first: int, count: int) -> Rows:
        """Sequences `first` ... `first + count - 1`."""
        chosen = self._mixture.sources(first, count)
        rows: Rows | None = None
        for index, source in enumerate(self._sources):
            places = np.flatnonzero(chosen == index)
            if not len(places):
                continue
            found = source.read(self._mixture.count(index, first), len(places))
            if rows is None:
                rows = Rows.empty(count, found.inputs.shape[1], masked=found.documents is not None)
            rows.inputs[places], rows.targets[places] = found.inputs, found.targets
            if rows.documents is not None and found.documents is not None:
                rows.documents[places] = found.documents
        assert rows is not None, "no sequence was asked for"
        return rows

    def count_targets(self, first: int, count: int) -> int:
        """Those of all sources."""
        total = 0
        for index, source in enumerate(self._sources):
            before = self._mixture.count(index, first)
            total += source.count_targets(before, self._mixture.count(index, first + count) - before)
        return total

    def pieces(self, first: int, count: int) -> list[list[Piece]]:
        """Those of the sources."""
        chosen = self._mixture.sources(first, count).tolist()
        found = [
            iter(source.pieces(self._mixture.count(index, first), chosen.count(index)) if index in chosen else ())
            for index, source in enumerate(self._sources)
        ]
        return [next(found[index]) for index in chosen]


def document_numbers(stream: TokenStream, start: int, length: int) -> Int64s:
    """For `length` tokens from position `start` a number for each one's document, ascending along them."""
    begins = np.zeros(length, dtype=np.int64)
    begins[stream.document_starts(start, length)] = 1
    return np.cumsum(begins)
