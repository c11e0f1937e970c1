import random
from pathlib import Path

import numpy as np
import pytest

from gpt.data.order import Mixture
from gpt.data.packing import pack
from gpt.data.sequences import (
    MixedSources,
    PackedDocuments,
    SequenceArrays,
    TraceableSequences,
    Windows,
    number_documents,
)
from gpt.data.shards import TokenStream
from gpt.utils.helper import IGNORED
from tests.conftest import write_stream

BLOCK = 8
END = 0


def write_numbered_stream(folder: Path, seed: int, n_documents: int = 60, per_shard: int = 1000) -> TokenStream:
    """Write documents of 1 to 30 tokens; each begins with END, and no other token is END or comes twice."""
    draw = random.Random(seed)
    documents, at = [], 1
    for _ in range(n_documents):
        length = draw.choice([1, 2, 5, 8, 9, 17, 30])
        documents.append(([END, *range(at, at + length - 1)], 1))
        at += length - 1
    return write_stream(folder, documents, per_shard=per_shard)


def number_documents_of_stream(stream: TokenStream) -> np.ndarray:
    """Return the number of the document at every position of the stream."""
    return np.cumsum(stream.read(0, len(stream)) == END)


def label_in_order_of_appearance(numbers: np.ndarray) -> list[int]:
    """Relabel numbers as 0, 1, 2 in order of appearance, so that equal groupings have equal labels."""
    return np.unique(numbers, return_inverse=True)[1].tolist()


def build_every_kind(folder: Path, *, document_mask: bool = True) -> dict[str, TraceableSequences]:
    """Build sequences of every kind."""
    streams = [write_numbered_stream(folder / str(seed), seed) for seed in range(3)]
    windows = [Windows(stream, BLOCK, seed=1, document_mask=document_mask) for stream in streams]
    packings = [pack(stream, BLOCK, ends_are_targets=True) for stream in streams]
    packed = [
        PackedDocuments(stream, packing, BLOCK, seed=1, end_of_text=END, document_mask=document_mask)
        for stream, packing in zip(streams, packings, strict=True)
    ]
    return {
        "windows": windows[0],
        "packed": packed[0],
        "mixed windows": MixedSources(windows[:2], Mixture((3, 1), 1)),
        "mixed packed": MixedSources(packed, Mixture((0.7, 0.2, 0.1), 1)),
        "mixed, one rare": MixedSources(packed, Mixture((1, 1e-4, 1), 1)),
    }


KINDS = ("windows", "packed", "mixed windows", "mixed packed", "mixed, one rare")


def as_rows(rows: SequenceArrays) -> list[list[int]]:
    arrays = [rows.inputs, rows.targets] + ([] if rows.documents is None else [rows.documents])
    return np.concatenate(arrays, axis=1).tolist()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("document_mask", [True, False])
def test_sequences_do_not_depend_on_how_many_are_read_at_a_time(tmp_path: Path, kind: str, document_mask: bool) -> None:
    sequences = build_every_kind(tmp_path, document_mask=document_mask)[kind]
    expected = as_rows(sequences.read(5, 400))  # some epochs of each source
    draw = random.Random(0)
    for largest in (1, 7, 150):
        at, together = 0, []
        while at < 400:
            count = min(draw.randint(1, largest), 400 - at)
            together += as_rows(sequences.read(5 + at, count))
            at += count
        assert together == expected


@pytest.mark.parametrize("kind", KINDS)
def test_count_targets_equals_counting_in_read_sequences(tmp_path: Path, kind: str) -> None:
    sequences = build_every_kind(tmp_path)[kind]
    for first, count in ((0, 1), (0, 500), (13, 300), (10**12, 64)):
        rows = sequences.read(first, count)
        assert sequences.count_targets(first, count) == (rows.targets != IGNORED).sum()
        assert rows.inputs.shape == rows.targets.shape == (count, BLOCK)
        assert rows.inputs.dtype == rows.targets.dtype == np.int64


@pytest.mark.parametrize("kind", KINDS)
def test_traced_ranges_hold_the_inputs(tmp_path: Path, kind: str) -> None:
    sequences = build_every_kind(tmp_path)[kind]
    for first, count in ((0, 200), (13, 1), (10**12, 64)):
        for pieces, row in zip(sequences.trace(first, count), sequences.read(first, count).inputs, strict=True):
            tokens = np.concatenate([piece.stream.read(piece.start, piece.length) for piece in pieces])
            assert tokens.tolist() == row[: len(tokens)].tolist()
            assert (row[len(tokens) :] == END).all()


@pytest.mark.parametrize("weights", [(0.7, 0.2, 0.1), (1, 1, 1), (0.01, 0.98, 0.01)])
def test_each_source_of_a_mixture_keeps_its_own_order_without_gaps(tmp_path: Path, weights: tuple[float, ...]) -> None:
    streams = [write_numbered_stream(tmp_path / str(seed), seed) for seed in range(3)]
    each = [Windows(stream, BLOCK, seed=4, document_mask=True) for stream in streams]
    mixture = Mixture(weights, 4)
    mixed = MixedSources(each, mixture)
    for first, count in ((0, 600), (601, 77)):
        read, chosen = as_rows(mixed.read(first, count)), mixture.choose_sources(first, count)
        for source, alone in enumerate(each):
            mine = [row for row, index in zip(read, chosen, strict=True) if index == source]
            assert mine == as_rows(alone.read(mixture.count(source, first), len(mine)))


def test_windows_hold_tokens_and_the_tokens_after_them(tmp_path: Path) -> None:
    stream = write_numbered_stream(tmp_path, 0)
    tokens = stream.read(0, len(stream)).astype(np.int64)
    rows = Windows(stream, BLOCK, seed=1, document_mask=False).read(0, 50)
    assert rows.documents is None
    windows = {tuple(tokens[at : at + BLOCK + 1]) for at in range(len(tokens) - BLOCK)}
    assert {(*i, t[-1]) for i, t in zip(rows.inputs.tolist(), rows.targets.tolist(), strict=True)} <= windows
    assert np.array_equal(rows.inputs[:, 1:], rows.targets[:, :-1])


@pytest.mark.parametrize("per_shard", [1, 7, 1000])
def test_windows_number_their_documents(tmp_path: Path, per_shard: int) -> None:
    stream = write_numbered_stream(tmp_path, 0, per_shard=per_shard)
    known = number_documents_of_stream(stream)
    for start in range(len(stream) - BLOCK):
        numbers = number_documents(stream, start, BLOCK)
        assert label_in_order_of_appearance(numbers) == label_in_order_of_appearance(known[start : start + BLOCK])
        assert (np.diff(numbers) >= 0).all()
    rows = Windows(stream, BLOCK, seed=1, document_mask=True).read(0, 60)
    assert rows.documents is not None
    for inputs, numbers in zip(rows.inputs, rows.documents, strict=True):
        begins = np.concatenate([[False], inputs[1:] == END])
        assert label_in_order_of_appearance(numbers) == np.cumsum(begins).tolist()


def test_packed_documents_and_padding_are_numbered(tmp_path: Path) -> None:
    stream = write_numbered_stream(tmp_path, 0)
    known = dict(zip(stream.read(0, len(stream)).tolist(), number_documents_of_stream(stream).tolist(), strict=True))
    packing = pack(stream, 16, ends_are_targets=True)
    rows = PackedDocuments(stream, packing, 16, seed=1, end_of_text=END, document_mask=True).read(
        0, packing.n_sequences
    )
    assert rows.documents is not None
    padded = 0
    for inputs, targets, numbers in zip(rows.inputs, rows.targets, rows.documents, strict=True):
        assert (np.diff(numbers) >= 0).all()
        real = targets != IGNORED
        padded += (~real).sum()
        assert (np.diff(real.astype(int)) <= 0).all()  # padding is at the end
        assert (inputs[~real] == END).all()
        assert not set(numbers[real]) & set(numbers[~real])
        for number in set(numbers[real]):
            piece = inputs[numbers == number]
            assert len({known[token] for token in piece if token}) <= 1
            assert (piece[1:] != END).all()
            assert targets[numbers == number][:-1].tolist() == piece[1:].tolist()
    assert padded == packing.n_sequences * 16 - len(stream)


def test_last_token_of_a_document_has_no_target_without_end_of_text(tmp_path: Path) -> None:
    stream = write_stream(tmp_path, [([5, 6, 7], 1), ([8], 1), ([9, 10], 1)])
    packing = pack(stream, BLOCK, ends_are_targets=False)
    packed = PackedDocuments(stream, packing, BLOCK, seed=1, end_of_text=None, document_mask=True)
    rows, x = packed.read(0, 1), IGNORED
    assert rows.documents is not None
    assert rows.inputs.tolist() == [[5, 6, 7, 9, 10, 8, 0, 0]]
    assert rows.targets.tolist() == [[6, 7, x, 10, x, x, x, x]]
    assert rows.documents.tolist() == [[0, 0, 0, 1, 1, 2, 3, 3]]
    assert packed.count_targets(0, 3) == 9
