"""Sequences for measuring: as a run reads them, but of no text."""

import numpy as np

from gpt.data.sequences import Rows

DOCUMENTS_PER_ROW = 4
"""Where attention is confined to documents."""


class SyntheticTokens:
    """Uniformly drawn tokens.

    Args:
        vocab_size: ids are below it.
        block_size: length of a sequence.
        masked: whether rows hold several documents, told apart.
    """

    def __init__(self, vocab_size: int, block_size: int, *, masked: bool):
        self._vocab_size, self._block_size, self._masked = vocab_size, block_size, masked

    def read(self, first: int, count: int) -> Rows:
        """Sequences `first` ... `first + count - 1`."""
        size = self._block_size
        tokens = np.random.default_rng(first).integers(self._vocab_size, size=(count, size + 1))
        documents = np.arange(size) * DOCUMENTS_PER_ROW // size
        return Rows(tokens[:, :-1], tokens[:, 1:], np.tile(documents, (count, 1)) if self._masked else None)

    def count_targets(self, first: int, count: int) -> int:
        """One for every position."""
        return count * self._block_size
