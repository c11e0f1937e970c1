from dataclasses import dataclass

import pytest

from gpt.data.prepare.documents import Document, TextDocument
from gpt.data.prepare.split import MAX_SHARE_OF_DOCUMENT, batch_by_size, split
from tests.conftest import read_documents


@pytest.fixture(scope="module")
def stdlib() -> list[Document]:
    return read_documents("stdlib")


def test_split_is_by_document_and_no_document_dominates_the_val_set(stdlib: list[Document]) -> None:
    train, val = split(stdlib, 0.1)
    assert sorted(d.name for d in train + val) == sorted(d.name for d in stdlib)
    total = sum(d.size for d in val)
    assert 0.1 <= total / sum(d.size for d in stdlib) < 0.106
    assert max(d.size for d in val) <= MAX_SHARE_OF_DOCUMENT * total


def test_both_splits_keep_the_order(stdlib: list[Document]) -> None:
    for half in split(stdlib, 0.3):
        assert [d.name for d in half] == [d.name for d in stdlib if d in half]


def test_split_does_not_depend_on_order() -> None:
    documents = [TextDocument(str(index), "x" * (index + 1)) for index in range(50)]
    assert {d.name for d in split(documents, 0.1)[1]} == {d.name for d in split(documents[::-1], 0.1)[1]}


def test_tail_of_a_single_document_is_held_out() -> None:
    text = "".join(chr(97 + index % 26) for index in range(1001))
    train, val = split([TextDocument("t", text)], 0.1)
    assert (train[0].text, val[0].text) == (text[: int(1001 * 0.9)], text[int(1001 * 0.9) :])


@pytest.mark.parametrize("count", [2, 3, 10])
def test_few_documents_are_not_cut_and_one_is_left_for_training(count: int) -> None:
    documents = [TextDocument(str(index), "x" * 100 * (index + 1)) for index in range(count)]
    train, val = split(documents, 0.1)
    assert train
    assert val
    assert sorted(train + val, key=lambda d: int(d.name)) == documents


def test_large_documents_are_held_out_last() -> None:
    documents = [TextDocument(f"large{index}", "x" * 1000) for index in range(30)] + [TextDocument("small", "y" * 10)]
    _, val = split(documents, 0.1)
    assert "small" in {d.name for d in val}
    assert sum(d.size for d in val) >= 0.1 * 30_010


def test_nothing_is_held_out_at_fraction_0() -> None:
    documents = [TextDocument("a", "x"), TextDocument("b", "y")]
    assert split(documents, 0.0) == (documents, [])
    assert split(documents[:1], 0.0) == (documents[:1], [])
    assert split(documents[:0], 0.1) == ([], [])


@pytest.mark.parametrize("limit", [1, 7, 20, 10_000])
def test_batches_keep_every_document_in_order(limit: int) -> None:
    documents = [TextDocument(str(index), "é" * (index % 5 + 1)) for index in range(40)]
    batches = list(batch_by_size(iter(documents), limit))
    assert [document for batch in batches for document in batch] == documents
    assert all(batches)
    assert all(sum(d.size for d in batch[:-1]) < limit for batch in batches)
    assert all(sum(d.size for d in batch) >= limit for batch in batches[:-1])


@pytest.mark.parametrize("size", [100, 30_000, 500_000])
def test_parts_split_by_themselves_hold_out_the_fraction_of_the_corpus(size: int) -> None:
    """However large the documents are in relation to a piece: of four, half a document is wanted."""
    pieces = [[Sized(f"{piece}:{index}", size) for index in range(4)] for piece in range(500)]
    held = [split(piece, 0.125, corpus_size=2000 * size)[1] for piece in pieces]
    assert sum(map(len, held)) == pytest.approx(250, abs=45)  # three standard deviations of drawing
    assert {len(documents) for documents in held} == {0, 1}


@dataclass(frozen=True)
class Sized:
    name: str
    size: int

    def split_tail(self, fraction: float) -> "tuple[Sized, Sized]":
        raise AssertionError("only a single document is cut")
