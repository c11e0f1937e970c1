"""One file -> documents. Formats are told apart by their first bytes, and compression is looked through.

text              one document
JSON lines        one object a line, whose text field is a document
Parquet           one row a document, of the text column
datasets folder   as `Dataset.save_to_disk` leaves it: one row a document
Hugging Face hub  as `datasets` streams it: one row a document
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
from gpt.data.prepare.token_files import is_token_file, is_token_index
from gpt.errors import UserError
from gpt.utils.helper import first_line

HEAD_BYTES = 8192
"""How much of a file is looked at to tell what it is; a NUL in it makes it binary, as git has it."""
MAX_LINE_BYTES = 2**30
"""Bytes of one JSON object; a longer line is taken for a mistake, not read into memory."""

GZIP, ZSTD, PARQUET = b"\x1f\x8b", b"\x28\xb5\x2f\xfd", b"PAR1"
JSON_LINES = {".jsonl", ".ndjson"}

Format = Literal["text", "json-lines", "parquet", "tokens", "binary", "token-index"]


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

    def document(self, record: object, place: str, name: str) -> Iterator[TextDocument]:
        """The document of a record; none for a bad one that is skipped, or an empty one."""
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
            self.refuse(f"{place}: no text under {self.text_field!r}; --data.text-field names another of: {keys}")

    def refuse(self, message: str) -> None:
        """Count a bad record, or raise UserError with the message."""
        if not self._skip_bad:
            raise UserError(f"{message} (--data.on-error skip leaves such records out)")
        self.skipped += 1


def format_of(path: Path) -> Format:
    """What a file holds.

    Raises:
        UserError: it cannot be read.
    """
    with reraise_as_user_error(path):
        with path.open("rb") as file:
            head = file.read(HEAD_BYTES)
        if head.startswith(PARQUET):
            return "parquet"
        if is_token_index(path, head):
            return "token-index"
        if is_token_file(path, head):
            return "tokens"
        with open_bytes(path) as stream:
            head = stream.read(HEAD_BYTES)
            if head.startswith(b"{") and b"\n" not in head:  # an object may be longer than this
                head += stream.readline(MAX_LINE_BYTES)
    if _is_json_lines(head, path):
        return "json-lines"
    return "binary" if b"\0" in head else "text"


def is_compressed(path: Path) -> bool:
    """Whether a file can only be read from its beginning."""
    with reraise_as_user_error(path), path.open("rb") as file:
        magic = file.read(4)
    return magic.startswith(GZIP) or magic == ZSTD


def open_bytes(path: Path) -> IO[bytes]:
    """The file's bytes, decompressed."""
    with path.open("rb") as file:
        magic = file.read(4)
    if magic.startswith(GZIP):
        return cast(IO[bytes], gzip.open(path))
    if magic == ZSTD:
        decompressor = extra("zstandard", "zstd", str(path)).ZstdDecompressor()
        stream = decompressor.stream_reader(path.open("rb"), read_across_frames=True, closefd=True)
        return io.BufferedReader(stream)
    return path.open("rb")


def read_text(path: Path, name: str, start: int = 0, stop: int | None = None) -> Iterator[TextDocument]:
    """The file, or the bytes [start, stop) of it, as one document, NULs and all.

    Raises:
        UserError: not UTF-8; names the offset.
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
    """The lines of a file, or those that begin in its bytes [start, stop); `start` is the beginning of one.

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
                yield from _json_line(line, records, path, start, number, f"{name}:{at}")
            at += len(line)


def _json_line(line: bytes, records: Records, path: Path, start: int, number: int, name: str) -> Iterator[TextDocument]:
    try:
        if len(line) == MAX_LINE_BYTES:
            raise ValueError(f"a line of {MAX_LINE_BYTES} bytes or more")
        record = json.loads(line)
        text = record.get(records.text_field) if type(record) is dict else None
        if type(text) is str and text and _is_unicode(text):  # nearly always, and then nothing more is to be done
            yield TextDocument(name, text)
        else:
            yield from records.document(record, f"{path}: line {_line(path, start, number)}", name)
    except (ValueError, RecursionError) as error:
        records.refuse(f"{path}: line {_line(path, start, number)}: not valid JSON: {error}")


def _line(path: Path, start: int, number: int) -> int:
    """The number in the file of line `number` after byte `start`; counted only for those who must be told."""
    before = 0
    with path.open("rb") as file:
        while start > 0 and (block := file.read(min(start, 2**20))):
            before += block.count(b"\n")
            start -= len(block)
    return before + number


def row_groups(path: Path, text_field: str) -> list[int]:
    """Bytes of each row group of a Parquet file.

    Raises:
        UserError: the file cannot be read or has no such column.
    """
    with reraise_as_user_error(path):
        file = extra("pyarrow.parquet", "parquet", str(path)).ParquetFile(path)
        if text_field not in file.schema_arrow.names:
            columns = ", ".join(file.schema_arrow.names)
            raise UserError(f"{path}: no column {text_field!r}; --data.text-field names another of: {columns}")
        return [file.metadata.row_group(group).total_byte_size for group in range(file.num_row_groups)]


def read_parquet(path: Path, name: str, records: Records, start: int, stop: int) -> Iterator[TextDocument]:
    """The rows of the row groups [start, stop).

    Raises:
        UserError: the file is damaged, or a row has no text.
    """
    with reraise_as_user_error(path):
        file = extra("pyarrow.parquet", "parquet", str(path)).ParquetFile(path)
        number = sum(file.metadata.row_group(group).num_rows for group in range(start))
        for batch in file.iter_batches(
            batch_size=1024, row_groups=range(start, stop), columns=[records.text_field], use_threads=False
        ):
            for row in batch.to_pylist():
                yield from records.document(row, f"{path}: row {number}", f"{name}:{number}")
                number += 1


def is_dataset(folder: Path) -> bool:
    """Whether `datasets` saved this folder."""
    return (folder / "state.json").exists() or (folder / "dataset_dict.json").exists()


def dataset_of(folder: Path) -> Any:
    """A dataset on disk; of several splits, the one that is called train.

    Raises:
        UserError: it has no such split, or cannot be read.
    """
    datasets = extra("datasets", "datasets", str(folder))
    with reraise_as_user_error(folder):
        dataset = datasets.load_from_disk(str(folder))
    if isinstance(dataset, datasets.DatasetDict):
        if "train" not in dataset:
            raise UserError(f"{folder}: no split is called train; name the folder of one: {', '.join(dataset)}")
        dataset = dataset["train"]
    return dataset


def read_dataset(folder: Path, records: Records, start: int, stop: int) -> Iterator[TextDocument]:
    """Rows [start, stop) of a dataset on disk.

    Raises:
        UserError: a row has no text.
    """
    for number, row in enumerate(dataset_of(folder).select(range(start, stop)), start):
        yield from records.document(row, f"{folder}: row {number}", f"{number}")


def stream_of(address: str) -> Any:
    """A dataset of the hub, `NAME[:CONFIG[:SPLIT]]`, as a stream: nothing is kept on the disk.

    Raises:
        UserError: there is none of this name, or it cannot be reached.
    """
    name, config, split = (*address.split(":"), "", "")[:3]
    datasets = extra("datasets", "datasets", f"hf:{address}")
    with reraise_as_user_error(Path(f"hf:{address}")):
        return datasets.load_dataset(name, config or None, split=split or "train", streaming=True)


def read_stream(address: str, records: Records, shard: int, n_shards: int) -> Iterator[TextDocument]:
    """The rows of one of a stream's shards.

    Raises:
        UserError: the stream breaks, or a row has no text.
    """
    place = f"hf:{address}"
    with reraise_as_user_error(Path(place)):
        stream = stream_of(address)
        rows = stream.shard(n_shards, shard) if n_shards > 1 else stream
        for number, row in enumerate(rows):
            yield from records.document(row, f"{place}: row {number} of shard {shard}", f"{shard}:{number}")


@contextmanager
def reraise_as_user_error(path: Path) -> Iterator[None]:
    """Turn what a damaged or unreadable file makes the libraries raise, each its own kind, into one line."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        raise UserError(f"{path}: cannot be read: {getattr(error, 'strerror', None) or first_line(error)}") from error


def extra(module: str, name: str, place: str) -> Any:
    """A library that only some sources need, or UserError with the extra that brings it."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise UserError(f"{place}: needs {module}; pip install 'gpt-training-pipeline[{name}]'") from error


def _decode(content: bytes, path: Path, start: int) -> str:
    """UTF-8, kept to the byte."""
    try:
        return content.decode("utf-8")
    except UnicodeDecodeError as error:
        byte, at = content[error.start], start + error.start
        raise UserError(f"{path}: not UTF-8 at byte offset {at} (0x{byte:02x}); convert the file to UTF-8") from error


def _is_json_lines(head: bytes, path: Path) -> bool:
    """By its name, or because its first line is an object and another one, or nothing, follows."""
    if JSON_LINES.intersection(path.suffixes):
        return True
    first, _, rest = head.partition(b"\n")
    try:
        return isinstance(json.loads(first), dict) and rest.lstrip()[:1] in (b"", b"{")
    except (ValueError, RecursionError):
        return False


def _is_unicode(text: str) -> bool:
    """JSON can spell half of a surrogate pair, which is no character."""
    if text.isascii():
        return True
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True
