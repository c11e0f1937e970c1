"""One file -> documents. Formats are told apart by their first bytes, and compression is looked through.

text              one document
JSON lines        one object a line, whose text field is a document
Parquet           one row a document, of the text column
datasets folder   as `Dataset.save_to_disk` leaves it: one row a document
"""

import gzip
import importlib
import io
import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import IO, Any, cast

from gpt.errors import UserError
from gpt.utils.helper import first_line

HEAD_BYTES = 8192
"""How much of a file is looked at to tell what it is; a NUL in it makes it binary, as git has it."""

GZIP, ZSTD, PARQUET = b"\x1f\x8b", b"\x28\xb5\x2f\xfd", b"PAR1"
JSON_LINES = {".jsonl", ".ndjson"}


@dataclass(frozen=True)
class Document:
    """One text of a corpus; `name` is its path inside the source, with the line or row of a file that holds many."""

    name: str
    text: str

    @cached_property
    def n_bytes(self) -> int:
        """Length as UTF-8."""
        return len(self.text.encode())


class Records:
    """What is taken of a record, and what becomes of a bad one.

    Args:
        text_field: the key or column that holds the text.
        skip_bad: leave out what cannot be read and count it, instead of raising.
    """

    def __init__(self, text_field: str, *, skip_bad: bool):
        self.text_field = text_field
        self.skipped = 0
        self._skip_bad = skip_bad

    def document(self, record: object, place: str, name: str) -> Iterator[Document]:
        """The document of a record; none for a bad one that is skipped."""
        text = record.get(self.text_field) if isinstance(record, Mapping) else None
        if isinstance(text, str) and _is_unicode(text):
            yield Document(name, text)
        elif isinstance(text, str):
            self.refuse(f"{place}: not valid Unicode: a lone surrogate")
        elif not isinstance(record, Mapping):
            self.refuse(f"{place}: not a JSON object")
        else:
            keys = ", ".join(map(str, record)) or "none"
            self.refuse(f"{place}: no text under {self.text_field!r}; --data.text-field names another of: {keys}")

    def refuse(self, message: str) -> None:
        """Count a bad record, or raise UserError with the message."""
        if not self._skip_bad:
            raise UserError(f"{message} (--data.on-error skip leaves such records out)")
        self.skipped += 1


def read_file(path: Path, name: str, records: Records) -> Iterator[Document] | None:
    """The documents of a file, or None if it is binary.

    Raises:
        UserError: the file or a record of it cannot be read; names the place.
    """
    with _told(path):
        with path.open("rb") as file:
            if file.read(len(PARQUET)) == PARQUET:
                return _parquet(path, name, records)
        with _open(path) as file:
            head = file.read(HEAD_BYTES)
    if _is_json_lines(head, path):
        return _json_lines(path, name, records)
    return None if b"\0" in head else read_text(path, name)


def is_dataset(folder: Path) -> bool:
    """Whether `datasets` saved this folder."""
    return (folder / "state.json").exists() or (folder / "dataset_dict.json").exists()


def read_dataset(folder: Path, records: Records) -> Iterator[Document]:
    """The rows of a dataset on disk; of several splits, the one that is called train.

    Raises:
        UserError: it has no such split or column.
    """
    datasets = _extra("datasets", "datasets", folder)
    with _told(folder):
        dataset = datasets.load_from_disk(str(folder))
    if isinstance(dataset, datasets.DatasetDict):
        if "train" not in dataset:
            raise UserError(f"{folder}: no split is called train; name the folder of one: {', '.join(dataset)}")
        dataset = dataset["train"]
    for index, row in enumerate(dataset):
        yield from records.document(row, f"{folder}: row {index}", f"{index}")


def decode(content: bytes, path: Path) -> str:
    """UTF-8, kept to the byte.

    Raises:
        UserError: names the offset of the first byte that is not UTF-8.
    """
    try:
        return content.decode("utf-8")
    except UnicodeDecodeError as error:
        byte = content[error.start]
        raise UserError(
            f"{path}: not UTF-8 at byte offset {error.start} (0x{byte:02x}); convert the file to UTF-8"
        ) from error


@contextmanager
def _told(path: Path) -> Iterator[None]:
    """Turn what a damaged or unreadable file makes the libraries raise, each its own kind, into one line."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        raise UserError(f"{path}: cannot be read: {getattr(error, 'strerror', None) or first_line(error)}") from error


def _open(path: Path) -> IO[bytes]:
    """The file's bytes, decompressed."""
    with path.open("rb") as file:
        magic = file.read(4)
    if magic.startswith(GZIP):
        return cast(IO[bytes], gzip.open(path))
    if magic == ZSTD:
        decompressor = _extra("zstandard", "zstd", path).ZstdDecompressor()
        stream = decompressor.stream_reader(path.open("rb"), read_across_frames=True, closefd=True)
        return io.BufferedReader(stream)
    return path.open("rb")


def _is_json_lines(head: bytes, path: Path) -> bool:
    """By its name, or because its first line is an object and another one, or nothing, follows."""
    if JSON_LINES.intersection(path.suffixes):
        return True
    first, _, rest = head.partition(b"\n")
    try:
        return isinstance(json.loads(first), dict) and rest.lstrip()[:1] in (b"", b"{")
    except (ValueError, RecursionError):
        return False


def read_text(path: Path, name: str) -> Iterator[Document]:
    """The whole file as one document, NULs and all."""
    with _told(path), _open(path) as file:
        yield Document(name, decode(file.read(), path))


def _json_lines(path: Path, name: str, records: Records) -> Iterator[Document]:
    with _told(path), _open(path) as file:
        for number, line in enumerate(file, start=1):
            if not line.strip():
                continue
            place = f"{path}: line {number}"
            try:
                record = json.loads(line)
            except (ValueError, RecursionError) as error:
                records.refuse(f"{place}: not valid JSON: {error}")
                continue
            yield from records.document(record, place, f"{name}:{number}")


def _parquet(path: Path, name: str, records: Records) -> Iterator[Document]:
    parquet = _extra("pyarrow.parquet", "parquet", path)
    with _told(path):
        file = parquet.ParquetFile(path)
        if records.text_field not in file.schema_arrow.names:
            columns = ", ".join(file.schema_arrow.names)
            raise UserError(f"{path}: no column {records.text_field!r}; --data.text-field names another of: {columns}")
        rows = (row for batch in file.iter_batches(columns=[records.text_field]) for row in batch.to_pylist())
        for number, row in enumerate(rows):
            yield from records.document(row, f"{path}: row {number}", f"{name}:{number}")


def _is_unicode(text: str) -> bool:
    """JSON can spell half of a surrogate pair, which is no character."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _extra(module: str, extra: str, path: Path) -> Any:
    """A library that only some sources need."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise UserError(f"{path}: needs {module}; pip install 'gpt-training-pipeline[{extra}]'") from error
