"""Formats of other projects that this one does not read: each is refused by name, with a way to convert it."""

import json
import re
from pathlib import Path

from gpt.data.prepare.records import BadFileError, shorten

TO_JSON_LINES = "write its texts as JSON lines"
FOREIGN_MAGIC = {
    b"ARROW1": ("an Arrow IPC file", "save it as Parquet"),
    b"\xff\xff\xff\xff": ("an Arrow IPC stream", "save it as Parquet, or name the folder of a saved dataset"),
    b"PARE": ("encrypted Parquet", "save it decrypted"),
    b"ORC": ("an ORC file", "save it as Parquet"),
    b"Obj\x01": ("an Avro file", "save it as Parquet"),
    b"PK\x03\x04": ("a zip archive", "unpack it into a folder"),
    b"7z\xbc\xaf\x27\x1c": ("a 7z archive", "unpack it into a folder"),
    b"Rar!\x1a\x07": ("a rar archive", "unpack it into a folder"),
    b"\x04\x22\x4d\x18": ("lz4-compressed", "decompress it, or compress it with zstd"),
    b"\xff\x06\x00\x00sNaPpY": ("snappy-compressed", "decompress it, or compress it with zstd"),
    b"LZIP": ("lzip-compressed", "decompress it, or compress it with xz"),
    b"\x1f\x9d": ("compressed with compress", "decompress it, or compress it with gzip"),
    b"\x89HDF\r\n\x1a\n": ("an HDF5 file", TO_JSON_LINES),
    b"SQLite format 3\0": ("an SQLite database", TO_JSON_LINES),
    b"%PDF-": ("a PDF", "convert it with pdftotext"),
    b"TNTIDX\0\0": ("a fairseq index", "convert it to Megatron's .bin and .idx"),
}
"""First bytes -> (what the file is, what to do with it)."""
FOREIGN_SUFFIXES = {
    ".mds": ("a shard of MosaicML StreamingDataset", f"{TO_JSON_LINES}, read with streaming.StreamingDataset"),
    ".tfrecord": ("a TFRecord file", TO_JSON_LINES),
    ".tfrecords": ("a TFRecord file", TO_JSON_LINES),
    ".array_record": ("an ArrayRecord file", TO_JSON_LINES),
    ".arrow": ("an Arrow IPC stream", "save it as Parquet, or name the folder of a saved dataset"),
    ".feather": ("a Feather file", "save it as Parquet"),
    ".pkl": ("a pickle", TO_JSON_LINES),
    ".ds": ("a file of datatrove's tokens", "save them by numpy.save as .npy"),
    ".br": ("brotli-compressed", "decompress it, or compress it with zstd"),
    ".lzma": ("lzma-compressed", "decompress it, or compress it with xz"),
}
"""Suffix of a binary file -> (what the file is, what to do with it)."""
LITDATA_CHUNK = re.compile(r"chunk-\d+-\d+\b.*\.bin")
CHUNK_INDEX = "index.json"
MAX_INDEX_BYTES = 2**26
NPY_MAGIC = b"\x93NUMPY"
WARC_START = re.compile(rb"WARC/\d\.\d\r?\n")
TAR_MAGIC, TAR_MAGIC_AT = b"ustar", 257
TOKENIZER_START = re.compile(rb'\s*\{\s*"version"\s*:\s*"[\d.]+"\s*,\s*"truncation"\s*:')
DATASET_NOTES = ("dataset_info.json", "dataset_infos.json", "dataset_dict.json")


def refuse_foreign_format(path: Path, head: bytes) -> None:
    """Refuse a file that begins with `head` if its format is known and not read.

    Raises:
        BadFileError: names the format, and how to convert it.
    """
    found = _name_foreign_format(path, head)
    if found:
        raise BadFileError(f"{shorten(path)} is {found[0]}; {found[1]}", is_foreign=True)


def find_foreign_chunks(folder: Path) -> tuple[str, str] | None:
    """Return (what a folder of packed chunks is, what to do with it); None for any other folder."""
    index = folder / CHUNK_INDEX
    try:
        if not index.is_file() or index.stat().st_size > MAX_INDEX_BYTES:
            return None
        content = json.loads(index.read_bytes())
    except (OSError, ValueError, RecursionError):
        return None
    if not isinstance(content, dict):
        return None
    if isinstance(content.get("chunks"), list) and "config" in content:
        return "a dataset of litdata", f"{TO_JSON_LINES}, read with litdata.StreamingDataset"
    if isinstance(content.get("shards"), list) and "version" in content:
        return "a MosaicML StreamingDataset", f"{TO_JSON_LINES}, read with streaming.StreamingDataset"
    return None


def name_foreign_note(path: Path, head: bytes) -> str | None:
    """Return the name of a file that belongs to a tokenizer or a dataset and is no text; None for any other."""
    if TOKENIZER_START.match(head):
        return "a tokenizer"
    return "a dataset's description" if path.name in DATASET_NOTES else None


def _name_foreign_format(path: Path, head: bytes) -> tuple[str, str] | None:
    if LITDATA_CHUNK.fullmatch(path.name):
        return find_foreign_chunks(path.parent)
    for magic, found in FOREIGN_MAGIC.items():
        if head.startswith(magic) and (b"\0" in head or not magic.isascii() or magic == b"%PDF-"):
            return None if magic == b"\xff\xff\xff\xff" and path.suffix == ".bin" else found
    if head[TAR_MAGIC_AT : TAR_MAGIC_AT + len(TAR_MAGIC)] == TAR_MAGIC:
        return "a tar archive (as of WebDataset)", "unpack it into a folder"
    if _is_tfrecord(head):
        return FOREIGN_SUFFIXES[".tfrecord"]
    if WARC_START.match(head):
        return "a WARC file (as of Common Crawl)", TO_JSON_LINES
    is_binary = b"\0" in head or head.startswith(b"\x80")
    if is_binary and path.suffix.lower() == ".npy" and not head.startswith(NPY_MAGIC):
        return "a .npy without its header (raw tokens, as of OLMo)", "rename it to .bin if its ids are uint16"
    return next((found for suffix, found in FOREIGN_SUFFIXES.items() if is_binary and suffix in path.suffixes), None)


def _is_tfrecord(head: bytes) -> bool:
    """Return whether bytes begin with a length and its masked CRC-32C, as a TFRecord does."""
    if len(head) < 16:
        return False
    crc = _compute_crc32c(head[:8])
    masked = ((crc >> 15 | crc << 17) + 0xA282EAD8) & 0xFFFFFFFF
    return masked == int.from_bytes(head[8:12], "little")


def _compute_crc32c(content: bytes) -> int:
    """Return the CRC-32C (Castagnoli) of a few bytes.

    >>> hex(_compute_crc32c(b"123456789"))
    '0xe3069283'
    """
    crc = 0xFFFFFFFF
    for byte in content:
        crc ^= byte
        for _ in range(8):
            crc = crc >> 1 ^ (0x82F63B78 if crc & 1 else 0)
    return crc ^ 0xFFFFFFFF
