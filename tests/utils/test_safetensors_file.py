import json
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

from gpt.utils.safetensors_file import TensorEntry, encode_header, read_header

ENTRIES = [TensorEntry('é"', "F32", [2, 3], 24), TensorEntry("empty", "U16", [0], 0), TensorEntry("b", "U8", [5], 5)]


@pytest.mark.parametrize("compact", [True, False])
def test_the_library_reads_a_file_with_this_header(tmp_path: Path, compact: bool) -> None:
    header = encode_header(ENTRIES, {"format": "test"}, compact=compact)
    assert len(header) % 8 == 0
    (tmp_path / "f").write_bytes(header + np.arange(6, dtype=np.float32).tobytes() + bytes(range(5)))
    loaded = load_file(tmp_path / "f")
    assert loaded['é"'].tolist() == [[0, 1, 2], [3, 4, 5]]
    assert loaded["empty"].shape == (0,)
    assert loaded["b"].tolist() == [0, 1, 2, 3, 4]


def test_token_files_keep_the_spaces_of_their_headers() -> None:
    header = encode_header(ENTRIES[2:], {"format": "test"}, compact=False)
    text = '{"__metadata__": {"format": "test"}, "b": {"dtype": "U8", "shape": [5], "data_offsets": [0, 5]}}'
    assert header == len(header[8:]).to_bytes(8, "little") + text.encode() + b" " * (-len(text) % 8)


def test_read_header_returns_the_json_text() -> None:
    header = encode_header(ENTRIES)
    assert read_header(BytesIO(header + bytes(29)), 1000) == header[8:]
    assert json.loads(header[8:])["b"]["data_offsets"] == [24, 29]
    assert read_header(BytesIO(header[:20]), 1000) == header[8:20]
    with pytest.raises(ValueError, match="its header of 1000000 bytes is longer than 1000 bytes"):
        read_header(BytesIO((10**6).to_bytes(8, "little")), 1000)
