"""Which documents of a part are held out for validation."""

import hashlib
import os
from collections.abc import Iterable, Iterator, Sequence
from typing import Protocol, Self, TypeVar

MAX_SHARE = 0.05
"""No document makes up more than this part of a validation set, where the corpus allows it."""


class Named(Protocol):
    """A document, or a file that is one."""

    @property
    def name(self) -> str:
        """Decides, by its hash, whether the document is held out."""
        ...

    @property
    def size(self) -> int:
        """Bytes or tokens."""
        ...


class Splittable(Named, Protocol):
    """A document, of text or of tokens."""

    def split_tail(self, fraction: float) -> tuple[Self, Self]:
        """The document without its last `fraction`, and that."""
        ...


D = TypeVar("D", bound=Splittable)


def batched(documents: Iterable[D], limit: int) -> Iterator[list[D]]:
    """Documents in order, about `limit` at a time, by size."""
    batch: list[D] = []
    held = 0
    for document in documents:
        batch.append(document)
        held += document.size
        if held >= limit:
            yield batch
            batch, held = [], 0
    if batch:
        yield batch


def split(documents: Sequence[D], val_fraction: float, *, corpus_size: int = 0) -> tuple[list[D], list[D]]:
    """Training and validation documents, the same on every machine.

    Whole documents, in the order of their names' hashes, until their bytes reach the fraction; one that would be too
    large a share of it waits until no other is left. Of a single document the tail is taken, as nanoGPT does.

    Args:
        documents: all of a corpus, or a piece of it that is split by itself.
        val_fraction: of the bytes.
        corpus_size: bytes of the whole corpus, where the documents are a piece of it.
    """
    if not val_fraction:
        return list(documents), []
    if len(documents) == 1:
        head, tail = documents[0].split_tail(val_fraction)
        return [head], [tail]
    chosen = held_out(documents, val_fraction, corpus_size=corpus_size)
    rest = [document for index, document in enumerate(documents) if index not in chosen]
    return rest, [document for index, document in enumerate(documents) if index in chosen]


def held_out(documents: Sequence[Named], val_fraction: float, *, corpus_size: int = 0) -> set[int]:
    """Which of several documents, or files of one each, are held out; see `split`."""
    size = sum(document.size for document in documents)
    wanted, large = val_fraction * size, MAX_SHARE * val_fraction * max(size, corpus_size)
    hashes = [hashlib.sha256(os.fsencode(document.name)).digest() for document in documents]
    order = sorted(
        range(len(documents)),
        key=lambda index: (documents[index].size if documents[index].size > large else 0, hashes[index]),
    )
    chosen: set[int] = set()
    taken = 0
    for index in order[:-1]:  # one is left to train on
        needed = wanted - taken
        # The last of each of many pieces would exceed the fraction; it is taken as often as makes up for that.
        chance = int.from_bytes(hashes[index][-4:], "big") / 2**32
        if needed <= 0 or (corpus_size > size and chance * documents[index].size > needed):
            break
        chosen.add(index)
        taken += documents[index].size
    return chosen
