"""Global batch -> the documents that it was cut from."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from gpt.configs.batch_plan import BatchPlan
from gpt.data.corpus import Corpus
from gpt.data.sequences import StreamRange, TraceableSequences
from gpt.data.shards import Tokens

MAX_NAMED_DOCUMENTS = 3
"""Documents that a message in one line names."""


@dataclass(frozen=True)
class Excerpt:
    """Part of one document, as a sequence contains it."""

    source: str
    shard: Path
    document: int
    """Number of the document in the shard."""
    offset: int
    """Position of the first token in the document."""
    range: StreamRange
    """Position in the stream."""

    @property
    def length(self) -> int:
        """Tokens."""
        return self.range.length

    def read(self, max_tokens: int) -> Tokens:
        """Read the first tokens of it."""
        return self.range.stream.read(self.range.start, min(self.range.length, max_tokens))

    def __str__(self) -> str:
        last = self.offset + self.length - 1
        return f"{self.source}: {self.shard.name} document {self.document}, tokens {self.offset} to {last}"


def find_excerpts(corpus: Corpus, sequences: TraceableSequences, batch: BatchPlan, index: int) -> list[list[Excerpt]]:
    """Return, for each sequence of global batch `index`, the documents in it, in order.

    Raises:
        UserError: a shard is not what was prepared.
    """
    size = batch.sequences_per_step
    return [
        [excerpt for range_ in ranges for excerpt in _cut_at_documents(corpus, range_)]
        for ranges in sequences.trace(index * size, size)
    ]


def name_documents(corpus: Corpus, sequences: TraceableSequences, batch: BatchPlan, index: int) -> str:
    """Name the first documents of global batch `index` in one line, and say how many more there are."""
    named = [str(excerpt) for excerpts in find_excerpts(corpus, sequences, batch, index) for excerpt in excerpts]
    n_more = len(named) - MAX_NAMED_DOCUMENTS
    more = f"; and {n_more} more, see gpt data-at" if n_more > 0 else ""
    return "; ".join(named[:MAX_NAMED_DOCUMENTS]) + more


def _cut_at_documents(corpus: Corpus, range_: StreamRange) -> Iterator[Excerpt]:
    """Cut a range where documents begin."""
    stream = range_.stream
    begins = [0, *(int(at) for at in stream.find_document_starts(range_.start, range_.length) if at > 0)]
    for begin, end in zip(begins, [*begins[1:], range_.length], strict=True):
        shard, document, offset = stream.locate(range_.start + begin)
        part = StreamRange(stream, range_.start + begin, end - begin)
        yield Excerpt(corpus.source_of[shard], shard, document, offset, part)
