"""Synthetic tokens, for measurements: as a run reads its sequences, but from no corpus."""

import numpy as np

from gpt.data.sequences import SequenceArrays

DOCUMENTS_PER_SEQUENCE = 4
"""Documents of a sequence, with a document mask."""


class SyntheticTokens:
    """Uniformly random tokens.

    Args:
        vocab_size: ids are below it.
        block_size: length of a sequence.
        document_mask: numbers several documents in each sequence.
    """

    def __init__(self, vocab_size: int, block_size: int, *, document_mask: bool):
        self._vocab_size, self._block_size, self._document_mask = vocab_size, block_size, document_mask

    def read(self, first: int, count: int) -> SequenceArrays:
        """Return `count` random sequences, the same ones for the same `first`."""
        size = self._block_size
        tokens = np.random.default_rng(first).integers(self._vocab_size, size=(count, size + 1))
        numbers = np.arange(size) * DOCUMENTS_PER_SEQUENCE // size
        documents = np.tile(numbers, (count, 1)) if self._document_mask else None
        return SequenceArrays(tokens[:, :-1].copy(), tokens[:, 1:].copy(), documents)

    def count_targets(self, first: int, count: int) -> int:
        """Count one target for every position."""
        return count * self._block_size
