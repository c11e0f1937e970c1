"""Training sequences by their position in a run: windows of a stream, packed documents, or a mixture of sources."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from gpt.data.order import Mixture, shuffle_epochs, window_starts
from gpt.data.packing import Int64s, Packing
from gpt.data.shards import TokenStream
from gpt.utils.helper import IGNORED

# Shapes: N sequences, T = block_size.

STARTS_PER_CALL = 512
"""Windows whose starts are computed in one call."""


@dataclass(frozen=True)
class SequenceArrays:
    """Some sequences as arrays."""

    inputs: Int64s
    """(N, T)."""
    targets: Int64s
    """(N, T): the token after each input; IGNORED if there is none to predict."""
    documents: Int64s | None
    """(N, T): number of each position's document within its sequence; None without a document mask."""

    @classmethod
    def empty(cls, n: int, block_size: int, *, document_mask: bool) -> "SequenceArrays":
        """Allocate room for `n` sequences."""
        shape = (n, block_size)
        documents = np.zeros(shape, np.int64) if document_mask else None
        return cls(np.empty(shape, np.int64), np.empty(shape, np.int64), documents)


@dataclass(frozen=True)
class StreamRange:
    """Tokens `start` ... `start + length - 1` of a stream."""

    stream: TokenStream
    start: int
    length: int


class Sequences(Protocol):
    """The sequences of a run, in its order."""

    def read(self, first: int, count: int) -> SequenceArrays:
        """Read sequences `first` ... `first + count - 1`."""
        ...

    def count_targets(self, first: int, count: int) -> int:
        """Count the tokens that these sequences predict, without reading them."""
        ...


class TraceableSequences(Sequences, Protocol):
    """Sequences that can be traced to their place in the corpus."""

    def trace(self, first: int, count: int) -> list[list[StreamRange]]:
        """Return, for each sequence, the ranges that its inputs consist of, padding left out."""
        ...


class Windows:
    """Windows of a token stream, reshuffled in each epoch.

    Args:
        stream: the documents, one after the other.
        block_size: length of a window.
        seed: of the order.
        document_mask: numbers the documents in each window, to confine attention to them.
    """

    def __init__(self, stream: TokenStream, block_size: int, *, seed: int, document_mask: bool):
        self._stream, self._block_size, self._seed = stream, block_size, seed
        self._document_mask = document_mask
        self._cached_starts = lru_cache(2)(self._compute_starts)

    def read(self, first: int, count: int) -> SequenceArrays:
        """Read sequences `first` ... `first + count - 1`."""
        size = self._block_size
        arrays = SequenceArrays.empty(count, size, document_mask=self._document_mask)
        for row, start in enumerate(self._find_starts(first, count)):
            tokens = self._stream.read(start, size + 1)
            arrays.inputs[row], arrays.targets[row] = tokens[:-1], tokens[1:]
            if arrays.documents is not None:
                arrays.documents[row] = number_documents(self._stream, start, size)
        return arrays

    def count_targets(self, first: int, count: int) -> int:
        """Count one target for every position."""
        return count * self._block_size

    def trace(self, first: int, count: int) -> list[list[StreamRange]]:
        """Return one range for each window."""
        return [[StreamRange(self._stream, start, self._block_size)] for start in self._find_starts(first, count)]

    def _find_starts(self, first: int, count: int) -> list[int]:
        """Return the starts of windows, from chunks of STARTS_PER_CALL: the time goes into calls, not into numbers."""
        chunks = range(first // STARTS_PER_CALL, (first + count - 1) // STARTS_PER_CALL + 1)
        starts = [start for chunk in chunks for start in self._cached_starts(chunk)]
        skipped = first - chunks.start * STARTS_PER_CALL
        return starts[skipped : skipped + count]

    def _compute_starts(self, chunk: int) -> list[int]:
        first = chunk * STARTS_PER_CALL
        starts: list[int] = window_starts(
            self._seed, first, STARTS_PER_CALL, len(self._stream), self._block_size
        ).tolist()
        return starts


class PackedDocuments:
    """Whole documents packed into sequences, reshuffled in each epoch.

    Args:
        stream: the documents.
        packing: which of them make up each sequence.
        block_size: length of a sequence.
        seed: of the order.
        end_of_text: id that the last document's last token predicts; None if there is no such token.
        document_mask: numbers the documents in each sequence, to confine attention to them.
    """

    def __init__(
        self,
        stream: TokenStream,
        packing: Packing,
        block_size: int,
        *,
        seed: int,
        end_of_text: int | None,
        document_mask: bool,
    ):
        self._stream, self._packing, self._block_size, self._seed = stream, packing, block_size, seed
        self._padding = np.array([0 if end_of_text is None else end_of_text])
        self._document_mask = document_mask

    def read(self, first: int, count: int) -> SequenceArrays:
        """Read sequences `first` ... `first + count - 1`."""
        arrays = SequenceArrays.empty(count, self._block_size, document_mask=self._document_mask)
        arrays.inputs[:] = self._padding
        arrays.targets[:] = IGNORED
        for part, _, indices in shuffle_epochs(self._seed, first, count, self._packing.n_sequences):
            for row, index in enumerate(indices.tolist(), part.start):
                self._fill(arrays, row, index)
        return arrays

    def count_targets(self, first: int, count: int) -> int:
        """Count the targets of these sequences, from the packing's sums."""
        sums = self._packing.target_sums
        return sum(
            int((sums[indices + 1] - sums[indices]).sum())
            for _, _, indices in shuffle_epochs(self._seed, first, count, self._packing.n_sequences)
        )

    def trace(self, first: int, count: int) -> list[list[StreamRange]]:
        """Return the documents of each sequence, or the parts of those that are longer than a sequence."""
        packing = self._packing
        spans = [
            packing.row_offsets[index : index + 2].tolist()
            for _, _, indices in shuffle_epochs(self._seed, first, count, packing.n_sequences)
            for index in indices.tolist()
        ]
        return [
            [StreamRange(self._stream, int(packing.starts[i]), int(packing.lengths[i])) for i in range(*span)]
            for span in spans
        ]

    def _fill(self, arrays: SequenceArrays, row: int, index: int) -> None:
        """Write packed sequence `index` into a row of the arrays."""
        packing, at = self._packing, 0
        first, stop = packing.row_offsets[index : index + 2].tolist()
        for number, piece in enumerate(range(first, stop)):
            length, n_targets = int(packing.lengths[piece]), int(packing.targets[piece])
            tokens = self._read_with_next(int(packing.starts[piece]), length)
            arrays.inputs[row, at : at + length] = tokens[:-1]
            arrays.targets[row, at : at + n_targets] = tokens[1 : n_targets + 1]
            if arrays.documents is not None:
                arrays.documents[row, at:] = number
            at += length
        if arrays.documents is not None and at < self._block_size:
            arrays.documents[row, at:] = stop - first  # padding counts as one more document

    def _read_with_next(self, start: int, length: int) -> npt.NDArray[np.integer[Any]]:
        """Read `length` tokens and the one after them."""
        if start + length < len(self._stream):
            return self._stream.read(start, length + 1)
        return np.concatenate([self._stream.read(start, length), self._padding])


class MixedSources:
    """Sequences of several sources, in the shares that weights give them.

    Args:
        sources: the sequences of each.
        mixture: chooses the source of each position.
    """

    def __init__(self, sources: Sequence[TraceableSequences], mixture: Mixture):
        self._sources, self._mixture = sources, mixture

    def read(self, first: int, count: int) -> SequenceArrays:
        """Read sequences `first` ... `first + count - 1`."""
        chosen = self._mixture.choose_sources(first, count)
        arrays: SequenceArrays | None = None
        for index, source in enumerate(self._sources):
            rows = np.flatnonzero(chosen == index)
            if not len(rows):
                continue
            part = source.read(self._mixture.count(index, first), len(rows))
            if arrays is None:
                arrays = SequenceArrays.empty(count, part.inputs.shape[1], document_mask=part.documents is not None)
            arrays.inputs[rows], arrays.targets[rows] = part.inputs, part.targets
            if arrays.documents is not None and part.documents is not None:
                arrays.documents[rows] = part.documents
        assert arrays is not None, "count is 0"
        return arrays

    def count_targets(self, first: int, count: int) -> int:
        """Sum the targets of all sources."""
        total = 0
        for index, source in enumerate(self._sources):
            before = self._mixture.count(index, first)
            total += source.count_targets(before, self._mixture.count(index, first + count) - before)
        return total

    def trace(self, first: int, count: int) -> list[list[StreamRange]]:
        """Return the ranges of each sequence, from its source."""
        chosen = self._mixture.choose_sources(first, count).tolist()
        traced = [
            iter(source.trace(self._mixture.count(index, first), chosen.count(index)) if index in chosen else ())
            for index, source in enumerate(self._sources)
        ]
        return [next(traced[index]) for index in chosen]


def number_documents(stream: TokenStream, start: int, length: int) -> Int64s:
    """Return a number for the document of each of `length` tokens from position `start`, ascending."""
    begins = np.zeros(length, dtype=np.int64)
    begins[stream.find_document_starts(start, length)] = 1
    return np.cumsum(begins)
