"""Compressed files: gzip, zstd, xz and bzip2, recognised by their first bytes and read to their last."""

import bz2
import gzip
import io
import lzma
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any, cast

from gpt.data.prepare.optional import import_extra
from gpt.data.prepare.records import BadFileError, reraise_as_user_error, shorten

GZIP_MAGIC, ZSTD_MAGIC, XZ_MAGIC = b"\x1f\x8b", b"\x28\xb5\x2f\xfd", b"\xfd7zXZ\0"
BZIP2_START = re.compile(rb"BZh[1-9](1AY&SY|\x17rE8P\x90)")
ZSTD_SKIPPABLE_FRAME = re.compile(rb"[\x50-\x5f]\x2a\x4d\x18", re.DOTALL)
MAX_ZSTD_WINDOW_BYTES = 2**31
"""Window of `zstd --long=31`, the largest."""
MAGIC_BYTES = 16
READ_BYTES = 2**17
MAGIC_OF_SUFFIX = {".gz": GZIP_MAGIC, ".zst": ZSTD_MAGIC, ".zstd": ZSTD_MAGIC, ".xz": XZ_MAGIC, ".bz2": b"BZh"}
"""Suffix -> first bytes; a shorter file is the beginning of a compressed one."""


def is_compressed(path: Path) -> bool:
    """Return whether a file is compressed, and so can only be read from its start."""
    with reraise_as_user_error(path), path.open("rb") as file:
        return detect_compression(path, file.read(MAGIC_BYTES)) is not None


def open_bytes(path: Path) -> IO[bytes]:
    """Open the file's bytes, decompressed."""
    with path.open("rb") as file:
        kind = detect_compression(path, file.read(MAGIC_BYTES))
    match kind:
        case "gzip":
            return cast(IO[bytes], gzip.open(path))
        case "xz":
            return io.BufferedReader(_FramesFile(path, lzma.LZMADecompressor), READ_BYTES)
        case "bzip2":
            return io.BufferedReader(_FramesFile(path, bz2.BZ2Decompressor), READ_BYTES)
        case "zstd":
            return io.BufferedReader(_ZstdFile(path), READ_BYTES)
    return path.open("rb")


def require_complete_zstd(path: Path) -> None:
    """Check the end of a file if it is compressed with zstd, which takes no decompression.

    Raises:
        BadFileError: the file ends in the middle of a frame.
    """
    with reraise_as_user_error(path), path.open("rb") as file:
        if detect_compression(path, file.read(MAGIC_BYTES)) == "zstd":
            file.seek(0)
            _require_complete_frames(path, file)


def remove_compression_suffix(path: Path) -> Path:
    """Return the path without the suffix of a compressed file.

    >>> remove_compression_suffix(Path("a.csv.gz")).name
    'a.csv'
    """
    return path.with_suffix("") if path.suffix.lower() in MAGIC_OF_SUFFIX else path


def detect_compression(path: Path, head: bytes) -> str | None:
    """Return the kind of compression of content that begins with `head`; None if it is not compressed.

    Raises:
        BadFileError: the file ends before its kind is clear, which its suffix gives.
    """
    if head.startswith(GZIP_MAGIC):
        return "gzip"
    if head.startswith(XZ_MAGIC):
        return "xz"
    if BZIP2_START.match(head):
        return "bzip2"
    if head.startswith(ZSTD_MAGIC) or ZSTD_SKIPPABLE_FRAME.match(head):
        return "zstd"
    magic = MAGIC_OF_SUFFIX.get(path.suffix.lower(), b"")
    if head and len(head) < MAGIC_BYTES and (magic.startswith(head) or (head.startswith(b"BZh") and magic == b"BZh")):
        raise _cut_error(path)
    return None


class _FramesFile(io.RawIOBase):
    """The content of an xz or bzip2 file. Other bytes after a frame are an error; Python's own reader ends there."""

    def __init__(self, path: Path, build_decompressor: Callable[[], lzma.LZMADecompressor | bz2.BZ2Decompressor]):
        self._build_decompressor = build_decompressor
        self._decompressor = build_decompressor()
        self._file = path.open("rb")

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while True:
            if self._decompressor.eof:
                content = self._decompressor.unused_data.lstrip(b"\0")  # xz pads with zeros
                content = content or self._file.read(READ_BYTES).lstrip(b"\0")
                if not content:
                    return 0
                self._decompressor = self._build_decompressor()
            else:
                content = self._file.read(READ_BYTES) if self._decompressor.needs_input else b""
                if self._decompressor.needs_input and not content:
                    raise EOFError
            output = self._decompressor.decompress(content, len(buffer))
            if output:
                buffer[: len(output)] = output
                return len(output)

    def close(self) -> None:
        self._file.close()
        super().close()


class _ZstdFile(io.RawIOBase):
    """The content of a zstd file. A file that was cut short is an error, which the library does not raise."""

    def __init__(self, path: Path):
        self._path = path
        decompressor = import_extra("zstandard", "zstd", str(path)).ZstdDecompressor(
            max_window_size=MAX_ZSTD_WINDOW_BYTES
        )
        self._file = path.open("rb")
        self._stream = decompressor.stream_reader(self._file, read_across_frames=True)

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        n_bytes = int(self._stream.readinto(buffer))
        if n_bytes == 0 and len(buffer):
            with self._path.open("rb") as file:
                _require_complete_frames(self._path, file)
        return n_bytes

    def close(self) -> None:
        self._file.close()
        super().close()


def _require_complete_frames(path: Path, file: IO[bytes]) -> None:
    """Follow the sizes of all blocks, which takes no decompression, to the end of the file (RFC 8878).

    Raises:
        BadFileError: the file ends in the middle of a frame.
    """
    size = os.fstat(file.fileno()).st_size

    def read(n_bytes: int) -> int:
        content = file.read(n_bytes)
        if len(content) < n_bytes:
            raise _cut_error(path)
        return int.from_bytes(content, "little")

    while file.tell() < size:
        if ZSTD_SKIPPABLE_FRAME.match(read(4).to_bytes(4, "little")):
            file.seek(read(4), os.SEEK_CUR)
        else:
            _skip_frame(file, read)
        if file.tell() > size:
            raise _cut_error(path)


def _skip_frame(file: IO[bytes], read: Any) -> None:
    """Move to the end of a frame whose magic number was read."""
    descriptor = read(1)
    is_single_segment = descriptor >> 5 & 1
    has_checksum = descriptor >> 2 & 1
    read((0 if is_single_segment else 1) + (0, 1, 2, 4)[descriptor & 3] + (is_single_segment, 2, 4, 8)[descriptor >> 6])
    is_last = 0
    while not is_last:
        header = read(3)
        is_last, is_run = header & 1, header >> 1 & 3 == 1
        n_bytes = 1 if is_run else header >> 3
        if n_bytes:
            file.seek(n_bytes - 1, os.SEEK_CUR)
            read(1)
    read(4 * has_checksum)


def _cut_error(path: Path) -> BadFileError:
    return BadFileError(f"{shorten(path)}: cannot be read: ends in the middle of a frame; copy or download it again")
