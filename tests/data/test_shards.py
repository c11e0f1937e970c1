from pathlib import Path

import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import load_file

from gpt.data.shards import BLOCK_BYTES, ShardInfo, ShardWriter, TokenStream, choose_token_dtype
from gpt.errors import UserError
from tests.conftest import limit_file_size, write_stream

DOCUMENTS = [(list(range(start, start + 10)), 100 + start) for start in range(0, 70, 10)]
PER_BLOCK = BLOCK_BYTES // 2


def write(path: Path, documents: list[tuple[list[int], int]], vocab_size: int = 2**16) -> ShardInfo:
    with ShardWriter(path, vocab_size) as writer:
        for ids, n_bytes in documents:
            writer.add(np.array(ids, dtype=np.int64), n_bytes)
        info = writer.finish()
    assert info is not None
    return info


@pytest.mark.parametrize("per_shard", [1, 2, 100])
def test_stream_does_not_depend_on_how_documents_are_sharded(tmp_path: Path, per_shard: int) -> None:
    stream = write_stream(tmp_path, DOCUMENTS, per_shard=per_shard)
    assert len(stream) == 70
    assert stream.n_documents == 7
    for start in range(70):
        for length in (0, 1, 11, 70 - start):
            if start + length <= 70:
                assert stream.read(start, length).tolist() == list(range(start, start + length))
                inside = [place - start for place in range(0, 70, 10) if start <= place < start + length]
                assert stream.find_document_starts(start, length).tolist() == inside
    assert np.concatenate(list(stream.iter_document_borders())).tolist() == list(range(0, 71, 10))


@pytest.mark.parametrize("per_shard", [1, 2, 100])
def test_locate_returns_shard_document_and_offset(tmp_path: Path, per_shard: int) -> None:
    stream = write_stream(tmp_path, DOCUMENTS, per_shard=per_shard)
    for position in range(70):
        document, token = divmod(position, 10)
        shard = tmp_path / f"train-{document // per_shard:06d}.safetensors"
        assert stream.locate(position) == (shard, document % per_shard, token)


def test_continued_document_is_the_first_of_its_shard(tmp_path: Path) -> None:
    first = write(tmp_path / "train-0.safetensors", DOCUMENTS[:2])
    with ShardWriter(tmp_path / "train-1.safetensors", 2**16, continues=True) as writer:
        for ids, n_bytes in DOCUMENTS[2:4]:
            writer.add(np.array(ids), n_bytes)
        second = writer.finish()
    assert second is not None
    stream = TokenStream([(tmp_path, first), (tmp_path, second)], 2**16)
    assert stream.locate(23) == (tmp_path / second.file, 0, 3)
    assert stream.locate(34) == (tmp_path / second.file, 1, 4)


@pytest.mark.parametrize("vocab_size", [2**16, 2**16 + 1])
@pytest.mark.parametrize("n_tokens", [0, 1, PER_BLOCK - 1, PER_BLOCK, 2 * PER_BLOCK + 3])
def test_shard_is_a_safetensors_file_with_offsets_and_byte_counts(
    tmp_path: Path, vocab_size: int, n_tokens: int
) -> None:
    ids = np.random.default_rng(0).integers(0, vocab_size, n_tokens).tolist()
    info = write(tmp_path / "train-0.safetensors", [(ids, 100), ([7, 8], 2)], vocab_size)
    arrays = load_file(tmp_path / info.file)
    assert arrays["tokens"].dtype == choose_token_dtype(vocab_size)
    assert arrays["tokens"].tolist() == [*ids, 7, 8]
    assert arrays["document_offsets"].tolist() == [0, n_tokens, n_tokens + 2]
    assert arrays["document_bytes"].tolist() == [100, 2]
    assert (info.tokens, info.documents, info.text_bytes) == (n_tokens + 2, 2, 102)
    assert info.largest_id == max([*ids, 8])
    with safe_open(tmp_path / info.file, "pt") as file:  # torch insists on aligned tensors
        assert file.get_tensor("tokens").tolist() == [*ids, 7, 8]


def test_shards_of_equal_documents_have_equal_bytes(tmp_path: Path) -> None:
    for index in range(8):
        write(tmp_path / f"s{index}.safetensors", DOCUMENTS)
    assert len({path.read_bytes() for path in tmp_path.iterdir()}) == 1


def test_token_dtype_is_the_smallest_that_holds_every_id() -> None:
    assert (choose_token_dtype(65536), choose_token_dtype(65537)) == (np.uint16, np.uint32)


@pytest.mark.parametrize("wrong", [300, 70_000, -1])
def test_id_outside_the_vocabulary_is_refused(tmp_path: Path, wrong: int) -> None:
    with (
        pytest.raises(UserError, match=f"token {wrong} is not in a vocabulary of 300"),
        ShardWriter(tmp_path / "train-0.safetensors", 300) as writer,
    ):
        writer.add(np.array([1, wrong]), 2)
    assert not list(tmp_path.iterdir())


def test_shard_without_documents_is_not_written(tmp_path: Path) -> None:
    with ShardWriter(tmp_path / "val-0.safetensors", 300) as writer:
        assert writer.finish() is None
    assert not list(tmp_path.iterdir())
    assert len(TokenStream([], 300)) == 0


def test_full_disk_leaves_no_files(tmp_path: Path) -> None:
    with (
        pytest.raises(OSError),
        limit_file_size(10_000),
        ShardWriter(tmp_path / "train-0.safetensors", 300) as writer,
    ):
        for _ in range(100):
            writer.add(np.zeros(1000, dtype=np.int64), 1000)
        writer.finish()
    assert not list(tmp_path.iterdir())


def test_missing_or_truncated_shard_is_named(tmp_path: Path) -> None:
    path = tmp_path / "train-0.safetensors"
    info = write(path, DOCUMENTS)
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(UserError, match=rf"{path}: the prepared shard has .* bytes instead of {info.size}"):
        TokenStream([(tmp_path, info)], 2**16)
    path.write_bytes(b"")
    with pytest.raises(UserError, match=f"{path}: the prepared shard has 0 bytes"):
        TokenStream([(tmp_path, info)], 2**16)
    path.write_bytes(b"\xff" * info.size)
    with pytest.raises(UserError, match=f"{path}: damaged"):
        TokenStream([(tmp_path, info)], 2**16).read(0, 1)
    path.unlink()
    with pytest.raises(UserError, match=f"{path}: the prepared shard is missing"):
        TokenStream([(tmp_path, info)], 2**16)


def test_flipped_bit_is_detected_when_its_block_is_read(tmp_path: Path) -> None:
    path = tmp_path / "train-0.safetensors"
    info = write(path, [(list(range(1000)) * 30, 1)])
    original = path.read_bytes()
    first_token = info.size - info.tokens * 2
    places = np.random.default_rng(0).integers(0, info.size, 200).tolist()
    for place in [*places, 0, 7, 8, first_token - 1, first_token, info.size - 1]:
        changed = bytearray(original)
        changed[place] ^= 1 << (place % 8)
        path.write_bytes(changed)
        stream = TokenStream([(tmp_path, info)], 2**16)
        with pytest.raises(UserError, match=rf"{path}: (damaged|changed)"):
            stream.read(0, len(stream))
        block = (place - first_token) // BLOCK_BYTES
        others = [start for start in range(0, info.tokens, PER_BLOCK) if start // PER_BLOCK != block]
        if place >= first_token:
            for start in others:
                assert TokenStream([(tmp_path, info)], 2**16).read(start, 1) == read_token(original, first_token, start)


def read_token(content: bytes, first_token: int, index: int) -> int:
    return int.from_bytes(content[first_token + 2 * index : first_token + 2 * index + 2], "little")


def test_changed_token_outside_the_vocabulary_is_named_with_its_offset(tmp_path: Path) -> None:
    path = tmp_path / "train-0.safetensors"
    info = write(path, [([1, 2, 3] * 10_000, 1)], vocab_size=300)
    content = bytearray(path.read_bytes())
    content[-2 * 5000 :][:2] = b"\xff\xff"
    content[len(content) - 10_000 : len(content) - 9_998] = (60_000).to_bytes(2, "little")
    path.write_bytes(content)
    stream = TokenStream([(tmp_path, info)], 300)
    assert stream.read(0, 10).tolist() == [1, 2, 3, 1, 2, 3, 1, 2, 3, 1]
    with pytest.raises(
        UserError, match=f"{path}: changed since .* token 60000 at offset 25000 is not in the vocabulary"
    ):
        stream.read(24_990, 20)


def test_shard_of_a_larger_vocabulary_is_refused_and_names_the_token(tmp_path: Path) -> None:
    path = tmp_path / "train-0.safetensors"
    info = write(path, [([1, 2, 400, 3], 1)])
    with pytest.raises(UserError, match=f"{path}: token 400 at offset 2 is not in the tokenizer's vocabulary of 300"):
        TokenStream([(tmp_path, info)], 300)
