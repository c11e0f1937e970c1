"""Global batch -> the documents that it was cut from."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from gpt.configs.batch_plan import BatchPlan
from gpt.data.corpus import Corpus
from gpt.data.sequences import Piece, TracedSequences
from gpt.data.shards import Tokens

NAMED = 3
"""Documents that a message in one line names."""


@dataclass(frozen=True)
class Excerpt:
    """What a sequence has of one document."""

    source: str
    shard: Path
    document: int
    """Its number in the shard."""
    offset: int
    """The first token's place in the document."""
    piece: Piece
    """Where it lies in its stream."""

    @property
    def length(self) -> int:
        """Tokens."""
        return self.piece.length

    def read(self, most: int) -> Tokens:
        """The first tokens of it."""
        return self.piece.stream.read(self.piece.start, min(self.piece.length, most))

    def __str__(self) -> str:
        last = self.offset + self.length - 1
        return f"{self.source}: {self.shard.name} document {self.document}, tokens {self.offset} to {last}"


def excerpts_of_batch(corpus: Corpus, sequences: TracedSequences, batch: BatchPlan, index: int) -> list[list[Excerpt]]:
    """Of each sequence of global batch `index` the documents in it, in order.

    Raises:
        UserError: a shard is not what was prepared.
    """
    size = batch.sequences_per_step
    return [
        [excerpt for piece in pieces for excerpt in _excerpts(corpus, piece)]
        for pieces in sequences.pieces(index * size, size)
    ]


def name_documents(corpus: Corpus, sequences: TracedSequences, batch: BatchPlan, index: int) -> str:
    """The first documents of global batch `index` in one line, and how many more there are."""
    named = [str(excerpt) for of_one in excerpts_of_batch(corpus, sequences, batch, index) for excerpt in of_one]
    more = f"; and {len(named) - NAMED} more, see gpt data-at" if len(named) > NAMED else ""
    return "; ".join(named[:NAMED]) + more


def _excerpts(corpus: Corpus, piece: Piece) -> Iterator[Excerpt]:
    """A piece cut where documents begin."""
    begins = [0, *(int(at) for at in piece.stream.document_starts(piece.start, piece.length) if at > 0)]
    for begin, end in zip(begins, [*begins[1:], piece.length], strict=True):
        shard, document, offset = piece.stream.locate(piece.start + begin)
        part = Piece(piece.stream, piece.start + begin, end - begin)
        yield Excerpt(corpus.source_of[shard], shard, document, offset, part)
