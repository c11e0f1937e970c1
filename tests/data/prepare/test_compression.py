import bz2
import gzip
import lzma
import random
import struct
from collections.abc import Callable
from pathlib import Path

import pytest
import zstandard

from gpt.data.prepare.compression import open_bytes
from gpt.data.prepare.records import Records
from gpt.errors import UserError
from tests.conftest import read_documents

LINES = b"".join(b'{"text": "document %d %d"}\n' % (i, random.Random(i).randrange(10**30)) for i in range(9000))
TEXTS = [line.split(b'"')[3].decode() for line in LINES.splitlines()]
SKIPPABLE = struct.pack("<II", 0x184D2A57, 300_000) + bytes(300_000)


def compress_blocks(content: bytes) -> bytes:
    """Compress into one frame of many blocks, as the zstd program does."""
    compressor = zstandard.ZstdCompressor(write_checksum=True).compressobj()
    blocks = [
        compressor.compress(content[start : start + 30_000]) + compressor.flush(zstandard.COMPRESSOBJ_FLUSH_BLOCK)
        for start in range(0, len(content), 30_000)
    ]
    return b"".join(blocks) + compressor.flush()


def compress_long(content: bytes, window_log: int) -> bytes:
    parameters = zstandard.ZstdCompressionParameters.from_level(1, window_log=window_log, enable_ldm=True)
    compressor = zstandard.ZstdCompressor(compression_params=parameters).compressobj()
    return compressor.compress(content) + compressor.flush()


COMPRESSORS: dict[str, Callable[[bytes], bytes]] = {
    "t.jsonl.gz": gzip.compress,
    "t.jsonl.zst": compress_blocks,
    "t.jsonl.xz": lzma.compress,
    "t.jsonl.bz2": bz2.compress,
}


@pytest.mark.parametrize("name", COMPRESSORS)
def test_several_frames_are_read_to_the_last(tmp_path: Path, name: str) -> None:
    compress = COMPRESSORS[name]
    half = LINES.index(b"\n", len(LINES) // 2) + 1
    (tmp_path / name).write_bytes(compress(LINES[:half]) + compress(b"") + compress(LINES[half:]))
    assert [document.content.decode() for document in read_documents(tmp_path / name)] == TEXTS


@pytest.mark.parametrize("before", [b"", SKIPPABLE, SKIPPABLE * 3])
def test_skippable_frames_of_zstd_are_skipped(tmp_path: Path, before: bytes) -> None:
    half = LINES.index(b"\n", len(LINES) // 2) + 1
    content = before + zstandard.compress(LINES[:half]) + SKIPPABLE * 2 + zstandard.compress(LINES[half:]) + SKIPPABLE
    (tmp_path / "t.zst").write_bytes(content)
    with open_bytes(tmp_path / "t.zst") as file:
        assert file.read() == LINES
    (tmp_path / "t.zst").write_bytes(content[:-1])
    with pytest.raises(UserError, match="ends in the middle of a frame"), open_bytes(tmp_path / "t.zst") as file:
        file.read()


@pytest.mark.parametrize("window_log", [28, 31])
def test_large_windows_of_zstd_are_read(tmp_path: Path, window_log: int) -> None:
    (tmp_path / "t.jsonl.zst").write_bytes(compress_long(LINES, window_log))
    assert len(read_documents(tmp_path / "t.jsonl.zst")) == len(TEXTS)


@pytest.mark.parametrize("name", COMPRESSORS)
@pytest.mark.parametrize("is_text", [False, True])
def test_file_that_is_cut_anywhere_is_reported(tmp_path: Path, name: str, is_text: bool) -> None:
    path = tmp_path / (name.replace("jsonl", "txt") if is_text else name)
    content = COMPRESSORS[name](LINES)
    for size in (1, 3, 5, 9, 20, len(content) // 3, len(content) * 3 // 4, len(content) - 4, len(content) - 1):
        path.write_bytes(content[:size])
        with pytest.raises(UserError, match=rf"{path.name}: cannot be read: ends in the middle of a frame; copy"):
            read_documents(path)


def test_cut_file_is_one_bad_record_if_skipped(tmp_path: Path) -> None:
    path = tmp_path / "t.jsonl.zst"
    content = compress_blocks(LINES)
    path.write_bytes(content[: len(content) // 2])
    records = Records("text", skip_bad=True)
    documents = read_documents(path, records)
    assert 100 < len(documents) < len(TEXTS)
    assert [document.content.decode() for document in documents] == TEXTS[: len(documents)]
    assert 1 <= records.skipped <= 2  # the file, and its last line
    assert any("ends in the middle of a frame" in reason for reason in records.reasons)


@pytest.mark.parametrize("garbage", [b"xy", b"and other bytes"])
@pytest.mark.parametrize("name", COMPRESSORS)
def test_other_bytes_after_the_last_frame_are_reported(tmp_path: Path, name: str, garbage: bytes) -> None:
    (tmp_path / name).write_bytes(COMPRESSORS[name](LINES) + garbage)
    with pytest.raises(UserError, match=rf"{name}: cannot be read: "):
        read_documents(tmp_path / name)


@pytest.mark.parametrize(
    ("name", "content", "what"),
    [
        ("t.parquet.gz", b"PAR1" + bytes(100), "Parquet in a compressed file"),
        ("t.npy.zst", b"\x93NUMPY\x01\x00" + bytes(100), "tokens in a compressed file"),
        ("t.bin.gz", b"\x01\x00" * 300, "tokens in a compressed file"),
        ("t.bin", b"\x01\x00" * 300, "tokens in a compressed file"),
        ("t.txt.gz.xz", gzip.compress(b"a text"), "compressed twice"),
    ],
)
def test_compressed_file_that_is_no_text_is_refused(tmp_path: Path, name: str, content: bytes, what: str) -> None:
    compress = {".zst": zstandard.compress, ".xz": lzma.compress}.get(Path(name).suffix, gzip.compress)
    (tmp_path / name).write_bytes(compress(content))
    with pytest.raises(UserError, match=rf"{name} is {what}; decompress it once"):
        read_documents(tmp_path / name)
