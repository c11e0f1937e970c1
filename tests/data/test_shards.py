from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

from gpt.data.shards import TokenStream, token_dtype, write_shards
from gpt.errors import UserError

DOCUMENTS = [(np.arange(start, start + 10, dtype=np.uint32), 100 + start) for start in range(0, 70, 10)]


@pytest.mark.parametrize("limit", [10, 25, 1000])
def test_documents_come_back_as_one_stream_however_they_are_sharded(tmp_path: Path, limit: int) -> None:
    shards = write_shards(tmp_path, "train", iter(DOCUMENTS), np.uint16, limit)
    stream = TokenStream(tmp_path, shards)
    assert len(stream) == 70
    for start in range(70):
        for length in (0, 1, 11, 70 - start):
            if start + length <= 70:
                assert stream.read(start, length).tolist() == list(range(start, start + length))


def test_a_shard_is_a_safetensors_file_with_offsets_and_byte_counts(tmp_path: Path) -> None:
    first, second = write_shards(tmp_path, "val", iter(DOCUMENTS[:3]), np.uint32, 20)
    arrays = load_file(tmp_path / first.file)
    assert arrays["tokens"].dtype == np.uint32
    assert arrays["document_offsets"].tolist() == [0, 10, 20]
    assert arrays["document_bytes"].tolist() == [100, 110]
    assert (first.tokens, first.documents, first.text_bytes, first.largest_id) == (20, 2, 210, 19)
    assert (second.file, second.tokens) == ("val-00001.safetensors", 10)


def test_the_same_documents_are_the_same_bytes(tmp_path: Path) -> None:
    for index in range(8):
        write_shards(tmp_path, f"s{index}", iter(DOCUMENTS), np.uint16)
    assert len({path.read_bytes() for path in tmp_path.iterdir()}) == 1


def test_the_smallest_type_that_holds_every_id_is_taken() -> None:
    assert (token_dtype(65536), token_dtype(65537)) == (np.uint16, np.uint32)


def test_no_documents_are_an_empty_stream(tmp_path: Path) -> None:
    assert len(TokenStream(tmp_path, write_shards(tmp_path, "val", iter([]), np.uint16))) == 0


def test_a_missing_or_cut_shard_is_named(tmp_path: Path) -> None:
    shards = write_shards(tmp_path, "train", iter(DOCUMENTS), np.uint16)
    path = tmp_path / shards[0].file
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(UserError, match=f"{path}: the prepared shard has .* bytes instead of {shards[0].size}"):
        TokenStream(tmp_path, shards)
    path.write_bytes(b"\xff" * shards[0].size)
    with pytest.raises(UserError, match=f"{path}: damaged"):
        TokenStream(tmp_path, shards)
    path.unlink()
    with pytest.raises(UserError, match=f"{path}: the prepared shard is missing"):
        TokenStream(tmp_path, shards)
