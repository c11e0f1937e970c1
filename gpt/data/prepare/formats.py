"""One file -> documents. A file's format is recognised by its first bytes, behind any compression.

text              one document
JSON lines        one object a line, whose text field is a document
Parquet           one row a document, of the text column
datasets folder   as `Dataset.save_to_disk` leaves it: one row a document
Hugging Face hub  as `datasets` streams it: one row a document

To add one: docs/extending.md, "A data format".
"""

import gzip
import importlib
import io
import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any, Literal, cast

from gpt.data.prepare.documents import TextDocument
from gpt.data.prepare.token_files import HEAD_BYTES, is_token_file, is_token_index
from gpt.errors import UserError
from gpt.utils.helper import first_line

MAX_LINE_BYTES = 2**30
"""Bytes of one JSON object; a longer line is an error and is not read into memory."""

GZIP_MAGIC, ZSTD_MAGIC, PARQUET_MAGIC = b"\x1f\x8b", b"\x28\xb5\x2f\xfd", b"PAR1"
JSON_LINES_SUFFIXES = {".jsonl", ".ndjson"}

Format = Literal["text", "json-lines", "parquet", "tokens", "binary", "token-index"]


class Records:
    """The text field of records, and the treatment of bad ones.

    Args:
        text_field: the key or column that holds the text.
        skip_bad: leaves out and counts a record without a text, instead of raising an error.
    """

    def __init__(self, text_field: str, *, skip_bad: bool):
        self.text_field = text_field
        self.skipped = 0
        self._skip_bad = skip_bad

    def read_document(self, record: object, place: str, name: str) -> Iterator[TextDocument]:
        """Yield the document of a record; nothing for an empty text, or a bad record that is skipped."""
        text = record.get(self.text_field) if isinstance(record, Mapping) else None
        if isinstance(text, str) and _is_unicode(text):
            if text:
                yield TextDocument(name, text)
        elif isinstance(text, str):
            self.refuse(f"{place}: not valid Unicode: a lone surrogate")
        elif not isinstance(record, Mapping):
            self.refuse(f"{place}: not a JSON object")
        else:
            keys = ", ".join(map(str, record)) or "none"
            self.refuse(f"{place}: no text under {self.text_field!r}; set --data.text-field to one of: {keys}")

    def refuse(self, message: str) -> None:
        """Count a bad record.

        Raises:
            UserError: bad records are not skipped.
        """
        if not self._skip_bad:
            raise UserError(f"{message} (--data.on-error skip leaves such records out)")
        self.skipped += 1


def detect_format(path: Path) -> Format:
    """Return the format of a file.

    Raises:
        UserError: the file cannot be read.
    """
    with reraise_as_user_error(path):
        with path.open("rb") as file:
            head = file.read(HEAD_BYTES)
        if head.startswith(PARQUET_MAGIC):
            return "parquet"
        if is_token_index(path, head):
            return "token-index"
        if is_token_file(path, head):
            return "tokens"
        with open_bytes(path) as stream:
            head = stream.read(HEAD_BYTES)
            if head.startswith(b"{") and b"\n" not in head:  # the first object may be longer than the head
                head += stream.readline(MAX_LINE_BYTES)
    if _is_json_lines(head, path):
        return "json-lines"
    return "binary" if b"\0" in head else "text"  # the rule of git


def is_compressed(path: Path) -> bool:
    """Return whether a file is compressed, and so can only be read from its start."""
    with reraise_as_user_error(path), path.open("rb") as file:
        magic = file.read(4)
    return magic.startswith(GZIP_MAGIC) or magic == ZSTD_MAGIC


def open_bytes(path: Path) -> IO[bytes]:
    """Open the file's bytes, decompressed."""
    with path.open("rb") as file:
        magic = file.read(4)
    if magic.startswith(GZIP_MAGIC):
        return cast(IO[bytes], gzip.open(path))
    if magic == ZSTD_MAGIC:
        decompressor = import_extra("zstandard", "zstd", str(path)).ZstdDecompressor()
        stream = decompressor.stream_reader(path.open("rb"), read_across_frames=True, closefd=True)
        return io.BufferedReader(stream)
    return path.open("rb")


def read_text(path: Path, name: str, start: int = 0, stop: int | None = None) -> Iterator[TextDocument]:
    """Yield the file, or its bytes [start, stop), as one document, NULs included; nothing if it is empty.

    Raises:
        UserError: the bytes are not UTF-8; names the offset.
    """
    with reraise_as_user_error(path), open_bytes(path) as file:
        if start:
            file.seek(start)
        content = file.read() if stop is None else file.read(stop - start)
    if content:
        yield TextDocument(name, _decode(content, path, start))


def read_json_lines(
    path: Path, name: str, records: Records, start: int = 0, stop: int | None = None
) -> Iterator[TextDocument]:
    """Yield the documents of the lines that begin in the bytes [start, stop) of a file; a line begins at `start`.

    Raises:
        UserError: a line is no JSON object with a text; names its number.
    """
    with reraise_as_user_error(path), open_bytes(path) as file:
        if start:
            file.seek(start)
        at = start
        number = 0
        while (stop is None or at < stop) and (line := file.readline(MAX_LINE_BYTES)):
            number += 1
            if line.strip():
                yield from _read_json_line(line, records, path, start, number, f"{name}:{at}")
            at += len(line)


def _read_json_line(
    line: bytes, records: Records, path: Path, start: int, number: int, name: str
) -> Iterator[TextDocument]:
    try:
        if len(line) == MAX_LINE_BYTES:
            raise ValueError(f"a line of {MAX_LINE_BYTES} bytes or more")
        record = json.loads(line)
        text = record.get(records.text_field) if type(record) is dict else None
        if type(text) is str and text and _is_unicode(text):  # the usual case, kept fast
            yield TextDocument(name, text)
        else:
            yield from records.read_document(record, f"{path}: line {_line_in_file(path, start, number)}", name)
    except (ValueError, RecursionError) as error:
        records.refuse(f"{path}: line {_line_in_file(path, start, number)}: not valid JSON: {error}")


def _line_in_file(path: Path, start: int, number: int) -> int:
    """Return the number in the file of line `number` after byte `start`; counted only for error messages."""
    before = 0
    with path.open("rb") as file:
        while start > 0 and (block := file.read(min(start, 2**20))):
            before += block.count(b"\n")
            start -= len(block)
    return before + number


def read_row_group_sizes(path: Path, text_field: str) -> list[int]:
    """Return the bytes of each row group of a Parquet file.

    Raises:
        UserError: the file cannot be read or has no such column.
    """
    with reraise_as_user_error(path):
        file = import_extra("pyarrow.parquet", "parquet", str(path)).ParquetFile(path)
        if text_field not in file.schema_arrow.names:
            columns = ", ".join(file.schema_arrow.names)
            raise UserError(f"{path}: no column {text_field!r}; set --data.text-field to one of: {columns}")
        return [file.metadata.row_group(group).total_byte_size for group in range(file.num_row_groups)]


def read_parquet(path: Path, name: str, records: Records, start: int, stop: int) -> Iterator[TextDocument]:
    """Yield the documents of the row groups [start, stop) of a Parquet file.

    Raises:
        UserError: the file is damaged, or a row has no text.
    """
    with reraise_as_user_error(path):
        file = import_extra("pyarrow.parquet", "parquet", str(path)).ParquetFile(path)
        number = sum(file.metadata.row_group(group).num_rows for group in range(start))
        for batch in file.iter_batches(
            batch_size=1024, row_groups=range(start, stop), columns=[records.text_field], use_threads=False
        ):
            for row in batch.to_pylist():
                yield from records.read_document(row, f"{path}: row {number}", f"{name}:{number}")
                number += 1


def is_dataset(folder: Path) -> bool:
    """Return whether `datasets` saved this folder."""
    return (folder / "state.json").exists() or (folder / "dataset_dict.json").exists()


def open_dataset(folder: Path) -> Any:
    """Open a dataset on disk; of several splits, the one named train.

    Raises:
        UserError: the dataset has no such split, or cannot be read.
    """
    datasets = import_extra("datasets", "datasets", str(folder))
    with reraise_as_user_error(folder):
        dataset = datasets.load_from_disk(str(folder))
    if isinstance(dataset, datasets.DatasetDict):
        if "train" not in dataset:
            raise UserError(f"{folder}: no split is called train; name the folder of one: {', '.join(dataset)}")
        dataset = dataset["train"]
    return dataset


def read_dataset(folder: Path, records: Records, start: int, stop: int) -> Iterator[TextDocument]:
    """Yield the documents of rows [start, stop) of a dataset on disk.

    Raises:
        UserError: a row has no text.
    """
    for number, row in enumerate(open_dataset(folder).select(range(start, stop)), start):
        yield from records.read_document(row, f"{folder}: row {number}", f"{number}")


def open_stream(address: str) -> Any:
    """Open a dataset of the hub, `NAME[:CONFIG[:SPLIT]]`, as a stream, which is not stored on the disk.

    Raises:
        UserError: there is no dataset of this name, or it cannot be reached.
    """
    name, config, split = (*address.split(":"), "", "")[:3]
    datasets = import_extra("datasets", "datasets", f"hf:{address}")
    with reraise_as_user_error(Path(f"hf:{address}")):
        return datasets.load_dataset(name, config or None, split=split or "train", streaming=True)


def read_stream(address: str, records: Records, shard: int, n_shards: int) -> Iterator[TextDocument]:
    """Yield the documents of one shard of a stream.

    Raises:
        UserError: the stream breaks, or a row has no text.
    """
    place = f"hf:{address}"
    with reraise_as_user_error(Path(place)):
        stream = open_stream(address)
        rows = stream.shard(n_shards, shard) if n_shards > 1 else stream
        for number, row in enumerate(rows):
            yield from records.read_document(row, f"{place}: row {number} of shard {shard}", f"{shard}:{number}")


@contextmanager
def reraise_as_user_error(path: Path) -> Iterator[None]:
    """Turn the exceptions of many kinds that libraries raise for a damaged or unreadable file into a UserError."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        raise UserError(f"{path}: cannot be read: {getattr(error, 'strerror', None) or first_line(error)}") from error


def import_extra(module: str, name: str, place: str) -> Any:
    """Import a library that only some sources need.

    Raises:
        UserError: it is not installed; names the extra that installs it.
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise UserError(f"{place}: needs {module}; pip install 'gpt-training-pipeline[{name}]'") from error


def _decode(content: bytes, path: Path, start: int) -> str:
    """Decode UTF-8 without changing a byte, such as a byte order mark or the end of a line."""
    try:
        return content.decode("utf-8")
    except UnicodeDecodeError as error:
        byte, at = content[error.start], start + error.start
        raise UserError(f"{path}: not UTF-8 at byte offset {at} (0x{byte:02x}); convert the file to UTF-8") from error


def _is_json_lines(head: bytes, path: Path) -> bool:
    """Return whether a file has a suffix of JSON lines, or starts with an object on a line of its own."""
    if JSON_LINES_SUFFIXES.intersection(path.suffixes):
        return True
    first, _, rest = head.partition(b"\n")
    try:
        return isinstance(json.loads(first), dict) and rest.lstrip()[:1] in (b"", b"{")
    except (ValueError, RecursionError):
        return False


def _is_unicode(text: str) -> bool:
    """Return whether a text has no lone surrogate, which JSON can spell but which is no character."""
    if text.isascii():
        return True
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True
