"""The documents that are held out for validation, chosen by the hashes of their names."""

import hashlib
import os
from collections.abc import Iterable, Iterator, Sequence
from typing import Protocol, Self, TypeVar

MAX_SHARE_OF_DOCUMENT = 0.05
"""Largest share of one document in a validation set, if the corpus allows it."""


class Named(Protocol):
    """A document, or a file that is one document."""

    @property
    def name(self) -> str:
        """Name whose hash decides whether the document is held out."""
        ...

    @property
    def size(self) -> int:
        """Bytes or tokens."""
        ...


class Splittable(Named, Protocol):
    """A document, of text or of tokens."""

    def split_tail(self, fraction: float) -> tuple[Self, Self]:
        """Split into the document without its last `fraction`, and that."""
        ...


D = TypeVar("D", bound=Splittable)


def batch_by_size(documents: Iterable[D], batch_size: int) -> Iterator[list[D]]:
    """Yield the documents in order, in batches of about `batch_size` bytes."""
    batch: list[D] = []
    size = 0
    for document in documents:
        batch.append(document)
        size += document.size
        if size >= batch_size:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def split(documents: Sequence[D], val_fraction: float, *, corpus_size: int = 0) -> tuple[list[D], list[D]]:
    """Split documents into training and validation documents, the same on every machine.

    Whole documents are held out, in the order of the hashes of their names, until their bytes reach the fraction. A
    document that would make up too large a share waits until no other is left. A single document is cut: its tail is
    held out, as in nanoGPT.

    Args:
        documents: all of a corpus, or a part of it that is split by itself.
        val_fraction: fraction of the bytes to hold out.
        corpus_size: bytes of the corpus, if the documents are a part of it.
    """
    if not val_fraction:
        return list(documents), []
    if len(documents) == 1:
        head, tail = documents[0].split_tail(val_fraction)
        return [head], [tail]
    chosen = choose_held_out(documents, val_fraction, corpus_size=corpus_size)
    rest = [document for index, document in enumerate(documents) if index not in chosen]
    return rest, [document for index, document in enumerate(documents) if index in chosen]


def choose_held_out(documents: Sequence[Named], val_fraction: float, *, corpus_size: int = 0) -> set[int]:
    """Return the indices of the documents, or files of one document each, to hold out; see `split`."""
    size = sum(document.size for document in documents)
    target, large = val_fraction * size, MAX_SHARE_OF_DOCUMENT * val_fraction * max(size, corpus_size)
    hashes = [hashlib.sha256(os.fsencode(document.name)).digest() for document in documents]
    order = sorted(
        range(len(documents)),
        key=lambda index: (documents[index].size if documents[index].size > large else 0, hashes[index]),
    )
    chosen: set[int] = set()
    taken = 0
    for index in order[:-1]:  # one is left to train on
        needed = target - taken
        # Each part of a corpus would exceed the fraction by its last document; it is taken with the probability that
        # makes the corpus as a whole meet the fraction.
        chance = int.from_bytes(hashes[index][-4:], "big") / 2**32
        if needed <= 0 or (corpus_size > size and chance * documents[index].size > needed):
            break
        chosen.add(index)
        taken += documents[index].size
    return chosen
