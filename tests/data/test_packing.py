import doctest
import random
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from gpt.configs.data_config import DataConfig
from gpt.data import packing
from gpt.data.corpus import open_corpus, prepare_corpus
from gpt.data.packing import Packing, load_or_pack, pack
from gpt.data.sequences import PackedDocuments
from gpt.data.shards import ShardWriter, TokenStream
from gpt.errors import UserError
from gpt.utils.helper import IGNORED
from tests.conftest import write_stream

LENGTHS = [random.Random(0).choice([1, 2, 3, 7, 8, 9, 15, 16, 17, 31, 64, 100]) for _ in range(100)]


def write_numbered_stream(folder: Path, lengths: Sequence[int], per_shard: int = 1000) -> TokenStream:
    """Write documents whose tokens count through all of them: 1, 2, 3 and so on."""
    ends = np.cumsum(lengths)
    return write_stream(
        folder, [(np.arange(e - n, e) + 1, 1) for e, n in zip(ends, lengths, strict=True)], 2**17, per_shard
    )


def first_tokens(lengths: Sequence[int]) -> list[int]:
    """Return the first token of every document that `write_numbered_stream` writes."""
    return (np.cumsum([0, *lengths[:-1]]) + 1).tolist()


def is_equal(ours: Packing, theirs: Packing) -> bool:
    return all(np.array_equal(value, getattr(theirs, name)) for name, value in vars(ours).items())


def test_worked_example() -> None:
    results = doctest.testmod(packing)
    assert (results.attempted, results.failed) == (1, 0)


@pytest.mark.parametrize("group", [2, 7, 2**16])
@pytest.mark.parametrize("per_shard", [1, 40])
@pytest.mark.parametrize("block_size", [1, 8, 50])
@pytest.mark.parametrize("has_end", [True, False])
def test_epoch_has_every_token_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, group: int, per_shard: int, block_size: int, has_end: bool
) -> None:
    monkeypatch.setattr(packing, "DOCUMENTS_PER_GROUP", group)
    stream = write_numbered_stream(tmp_path / "shards", LENGTHS, per_shard)
    packed = pack(stream, block_size, ends_are_targets=has_end)
    end = 0 if has_end else None
    sequences = PackedDocuments(stream, packed, block_size, seed=1, end_of_text=end, document_mask=True)
    for epoch in (0, 3):
        rows = sequences.read(epoch * packed.n_sequences, packed.n_sequences)
        every = list(range(1, len(stream) + 1))
        assert sorted(rows.inputs[rows.inputs > 0].tolist()) == every
        predicted = sorted(rows.targets[rows.targets != IGNORED].tolist())
        if has_end:  # the next document's first token stands for the end of the one before it
            assert predicted == [0, *every[1:]]
        else:
            assert predicted == sorted(set(every) - set(first_tokens(LENGTHS)))
        where = (rows.targets != IGNORED) & (rows.targets > 0)
        assert np.array_equal(rows.targets[where], rows.inputs[where] + 1)
    sums = [(row != IGNORED).sum() for row in sequences.read(0, packed.n_sequences).targets]
    numbers = [sequences.count_targets(row, 1) for row in range(packed.n_sequences)]
    assert numbers == sums
    assert packed.target_sums[-1] == packed.targets.sum() == sum(sums) == sequences.count_targets(0, packed.n_sequences)


@pytest.mark.parametrize("block_size", [8, 16, 50])
def test_only_documents_longer_than_a_sequence_are_cut(tmp_path: Path, block_size: int) -> None:
    packed = pack(write_numbered_stream(tmp_path / "shards", LENGTHS), block_size, ends_are_targets=True)
    expected = []
    for first, length in zip(first_tokens(LENGTHS), LENGTHS, strict=True):
        for start in range(0, length, block_size):
            expected.append((first - 1 + start, min(block_size, length - start)))
    assert sorted(zip(packed.starts.tolist(), packed.lengths.tolist(), strict=True)) == expected
    rows = np.add.reduceat(packed.lengths, packed.row_offsets[:-1])
    assert rows.max() <= block_size
    assert packed.row_offsets[-1] == len(packed.starts)


def plain_best_fit(lengths: Sequence[int], capacity: int) -> list[list[int]]:
    """Pack as the rule is stated: longest first, each where the least room remains."""
    rows: list[list[int]] = []
    for length in sorted(lengths, reverse=True):
        fitting = [row for row in rows if sum(row) + length <= capacity]
        if fitting:
            max(fitting, key=sum).append(length)
        else:
            rows.append([length])
    return rows


@pytest.mark.parametrize("capacity", [5, 64, 200])
def test_best_fit_fills_rows_as_the_plain_algorithm_does(capacity: int) -> None:
    draw = random.Random(capacity)
    for n in (0, 1, 10, 200):
        lengths = sorted((draw.randint(1, capacity - 1) for _ in range(n)), reverse=True)
        rows = packing._best_fit(lengths, capacity)
        assert sorted(index for row in rows for index in row) == list(range(n))
        ours = sorted(sorted(lengths[index] for index in row) for row in rows)
        fills = [sorted(map(sum, found)) for found in (ours, plain_best_fit(lengths, capacity))]
        assert fills[0] == fills[1]


def test_empty_documents_and_empty_streams(tmp_path: Path) -> None:
    packed = pack(write_numbered_stream(tmp_path / "some", [3, 0, 5, 0]), 8, ends_are_targets=True)
    assert (packed.n_sequences, sorted(packed.lengths.tolist())) == (1, [3, 5])
    assert pack(TokenStream([], 10), 8, ends_are_targets=True).n_sequences == 0
    assert pack(write_numbered_stream(tmp_path / "one", [5]), 8, ends_are_targets=True).lengths.tolist() == [5]


@pytest.mark.parametrize("has_end", [True, False])
def test_document_that_continues_in_other_shards_is_one_document(tmp_path: Path, has_end: bool) -> None:
    shards = []
    pieces = [([4, 10], False), ([7], True), ([9, 3], True), ([2, 30], False)]  # 4, 10+7+9, 3, 2, 30
    at = 1
    for index, (lengths, continues) in enumerate(pieces):
        path = tmp_path / f"train-{index}.safetensors"
        with ShardWriter(path, 100, continues=continues) as writer:
            for length in lengths:
                writer.add(np.arange(at, at + length), 1)
                at += length
            info = writer.finish()
        assert info is not None
        shards.append((path.parent, info))
    apart = pack(TokenStream(shards, 100), 8, ends_are_targets=has_end)
    assert is_equal(
        apart, pack(write_numbered_stream(tmp_path / "one", [4, 26, 3, 2, 30]), 8, ends_are_targets=has_end)
    )


@pytest.fixture
def load_packing(tmp_path: Path) -> Callable[[], Packing]:
    """Pack some documents, or load their packing from tmp_path/packing.safetensors."""
    stream = write_numbered_stream(tmp_path / "shards", [3, 7, 20, 5, 5, 1])
    return lambda: load_or_pack(stream, 8, ends_are_targets=True, path=tmp_path / "packing.safetensors")


def test_saved_packing_is_loaded_and_not_packed_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, load_packing: Callable[[], Packing]
) -> None:
    packed = load_packing()
    assert is_equal(
        packed, pack(write_numbered_stream(tmp_path / "again", [3, 7, 20, 5, 5, 1]), 8, ends_are_targets=True)
    )
    monkeypatch.setattr(packing, "pack", None)
    assert is_equal(load_packing(), packed)
    assert sorted(p.name for p in tmp_path.glob("packing*")) == ["packing.safetensors"]


def test_damaged_packing_is_reported_in_one_line(tmp_path: Path, load_packing: Callable[[], Packing]) -> None:
    load_packing()
    path = tmp_path / "packing.safetensors"
    intact = path.read_bytes()
    places = [0, 7, 8, 60, len(intact) - 1, *random.Random(0).sample(range(len(intact)), 60)]
    for place in places:
        changed = bytearray(intact)
        changed[place] ^= 1 << place % 8
        path.write_bytes(changed)
        with pytest.raises(UserError, match=rf"^{path}: .*; delete it") as error:
            load_packing()
        assert "\n" not in str(error.value)
    for content in (b"", b"{}", intact[:-8], intact + b"\0"):
        path.write_bytes(content)
        with pytest.raises(UserError, match=rf"^{path}: .*; delete it"):
            load_packing()
    path.write_bytes(intact)
    tensors = load_file(path)
    del tensors["starts"]
    save_file(tensors, path)
    with pytest.raises(UserError, match=rf"^{path}: changed since it was packed: .*; delete it"):
        load_packing()


def test_packing_that_cannot_be_saved_is_reported_in_one_line(tmp_path: Path) -> None:
    stream = write_numbered_stream(tmp_path / "shards", [3, 7])
    with pytest.raises(UserError, match=r"no/folder/x.safetensors: .*; delete it if it is there, or name another"):
        load_or_pack(
            stream, 8, ends_are_targets=True, path=tmp_path / "shards/train-000000.safetensors/no/folder/x.safetensors"
        )


@pytest.mark.parametrize("block_size", [128, 1024])
def test_packing_pythons_library_leaves_little_padding(cache_dir: Path, block_size: int) -> None:
    data = DataConfig(packing="best-fit", cache_dir=cache_dir, tokenizer="bpe", vocab_size=512)
    corpus = open_corpus(prepare_corpus(data), data, block_size)
    (stream,), (packed,) = corpus.train.values(), corpus.packings.values()
    positions = packed.n_sequences * block_size
    assert packed.lengths.sum() == len(stream)
    assert packed.targets.sum() == len(stream)  # every document begins with end-of-text, and is followed by one
    assert 1 - len(stream) / positions < 0.03
    assert corpus.facts.streams[0].packed_sequences == packed.n_sequences
    rows = PackedDocuments(
        stream, packed, block_size, seed=1, end_of_text=corpus.tokenizer.end_of_text, document_mask=False
    )
    every = rows.read(0, packed.n_sequences)
    assert (every.targets == corpus.tokenizer.end_of_text).sum() == stream.n_documents
    assert (every.targets != IGNORED).sum() == len(stream)
    assert np.array_equal(np.bincount(every.targets[every.targets >= 0]), np.bincount(stream.read(0, len(stream))))
