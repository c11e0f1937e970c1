"""Which documents of a part are held out for validation."""

import hashlib
import os
from collections.abc import Iterable, Iterator, Sequence
from typing import Protocol, Self, TypeVar

LARGEST_SHARE = 0.05
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

    def halves(self, fraction: float) -> tuple[Self, Self]:
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


def split(documents: Sequence[D], val_fraction: float) -> tuple[list[D], list[D]]:
    """Training and validation documents, the same on every machine.

    Whole documents, in the order of their names' hashes, until their bytes reach the fraction; one that would be too
    large a share of it waits until no other is left. Of a single document the tail is taken, as nanoGPT does.
    """
    if not val_fraction:
        return list(documents), []
    if len(documents) == 1:
        head, tail = documents[0].halves(val_fraction)
        return [head], [tail]
    chosen = held_out(documents, val_fraction)
    rest = [document for index, document in enumerate(documents) if index not in chosen]
    return rest, [document for index, document in enumerate(documents) if index in chosen]


def held_out(documents: Sequence[Named], val_fraction: float) -> set[int]:
    """Which of several documents, or files of one each, are held out."""
    wanted = val_fraction * sum(document.size for document in documents)
    order = sorted(
        range(len(documents)),
        key=lambda index: (
            size if (size := documents[index].size) > LARGEST_SHARE * wanted else 0,
            hashlib.sha256(os.fsencode(documents[index].name)).digest(),
        ),
    )
    chosen: set[int] = set()
    taken = 0
    for index in order[:-1]:  # one is left to train on
        if taken >= wanted:
            break
        chosen.add(index)
        taken += documents[index].size
    return chosen
