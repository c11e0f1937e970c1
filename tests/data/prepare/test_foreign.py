import gzip
import io
import json
import struct
import tarfile
from collections.abc import Callable
from pathlib import Path

import pyarrow
import pytest

from gpt.data.prepare.foreign import _compute_crc32c
from gpt.data.prepare.sources import find_source
from gpt.errors import UserError


def write_arrow(path: Path) -> None:
    table = pyarrow.table({"text": ["one"]})
    with pyarrow.OSFile(str(path), "wb") as file, pyarrow.ipc.new_file(file, table.schema) as writer:
        writer.write_table(table)


def write_arrow_stream(path: Path) -> None:
    table = pyarrow.table({"text": ["one"]})
    with pyarrow.OSFile(str(path), "wb") as file, pyarrow.ipc.new_stream(file, table.schema) as writer:
        writer.write_table(table)


def write_tfrecord(path: Path) -> None:
    length = struct.pack("<Q", 10)
    crc = _compute_crc32c(length)
    masked = ((crc >> 15 | crc << 17) + 0xA282EAD8) & 0xFFFFFFFF
    path.write_bytes(length + struct.pack("<I", masked) + b"only ascii" + b"crc ")


def write_tar(path: Path) -> None:
    with tarfile.open(path, "w:gz" if path.suffix == ".gz" else "w") as archive:
        member = tarfile.TarInfo("0001.txt")
        member.size = 4
        archive.addfile(member, io.BytesIO(b"text"))


WARC = b"WARC/1.0\r\nWARC-Type: conversion\r\n\r\nA text.\r\n"
FILES: dict[str, tuple[Callable[[Path], object], str]] = {
    "a.arrow": (write_arrow, "an Arrow IPC file; save it as Parquet"),
    "b.arrow": (write_arrow_stream, "an Arrow IPC stream; save it as Parquet"),
    "a.tfrecord-00000-of-00001": (write_tfrecord, "a TFRecord file; write its texts as JSON lines"),
    "a.tar": (write_tar, r"a tar archive \(as of WebDataset\); unpack it into a folder"),
    "a.tar.gz": (write_tar, r"a tar archive \(as of WebDataset\); unpack it into a folder"),
    "shard.00000.mds": (lambda path: path.write_bytes(struct.pack("<2I", 1, 12) + b"text"), "MosaicML"),
    "a.warc": (lambda path: path.write_bytes(WARC), "a WARC file .*; write its texts as JSON lines"),
    "a.warc.wet.gz": (lambda path: path.write_bytes(gzip.compress(WARC)), "a WARC file .*; write its texts as JSON"),
    "part-0-00000.npy": (
        lambda path: path.write_bytes(struct.pack("<600H", *range(600))),
        "a .npy without its header .*; rename it to .bin if its ids are uint16",
    ),
    "00000_unshuffled.ds": (
        lambda path: path.write_bytes(struct.pack("<600H", *range(600))),
        "a file of datatrove's tokens; save them by numpy.save as .npy",
    ),
    "a.zip": (lambda path: path.write_bytes(b"PK\x03\x04\x14\0" + bytes(30)), "a zip archive; unpack it into a folder"),
}


@pytest.mark.parametrize("name", FILES)
def test_file_of_another_project_is_refused_by_name(tmp_path: Path, name: str) -> None:
    write, message = FILES[name]
    write(tmp_path / name)
    with pytest.raises(UserError, match=rf"{name} is .*{message}"):
        find_source(str(tmp_path / name))
    with pytest.raises(UserError, match=rf"{name} is .*{message}"):
        find_source(str(tmp_path))
    (tmp_path / "a.txt").write_text("a text")
    source = find_source(str(tmp_path))
    assert [file.name for file in source.files] == ["a.txt"]
    assert len(source.left_out) == 1
    assert source.left_out[0].startswith(f"{name} (")


@pytest.mark.parametrize(
    ("index", "chunk", "what"),
    [
        ({"chunks": [{"filename": "chunk-0-0.bin"}], "config": {}}, "chunk-0-0.bin", "a dataset of litdata"),
        ({"shards": [{"format": "mds"}], "version": 2}, "shard.00000.mds", "a MosaicML StreamingDataset"),
    ],
)
def test_packed_chunks_of_another_project_are_refused_by_name(
    tmp_path: Path, index: dict[str, object], chunk: str, what: str
) -> None:
    folder = tmp_path / "packed"
    folder.mkdir()
    (folder / "index.json").write_text(json.dumps(index))
    (folder / chunk).write_bytes(struct.pack("<600H", *range(600)))
    (folder / "README.md").write_text("a text about the chunks")
    with pytest.raises(UserError, match=f"packed is {what}; write its texts as JSON lines"):
        find_source(str(folder))
    if chunk.endswith(".bin"):
        with pytest.raises(UserError, match=f"{chunk} is {what}"):
            find_source(str(folder / chunk))
    (tmp_path / "a.txt").write_text("a text")
    source = find_source(str(tmp_path))
    assert [file.name for file in source.files] == ["a.txt"]
    assert source.left_out[0].startswith(f"packed ({what}")


@pytest.mark.parametrize(
    "start", ["PARENTS", "ORCAS are", "LZIP", "ARROW1", "Obj\x01", "BZh91", "WARC/1.0 is", "(", "[section]"]
)
def test_text_that_begins_like_another_format_is_text(tmp_path: Path, start: str) -> None:
    (tmp_path / "a.txt").write_text(f"{start} and more of the text")
    assert find_source(str(tmp_path / "a.txt")).files[0].kind == "text"
