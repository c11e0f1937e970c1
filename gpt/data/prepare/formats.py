"""One file -> documents. A file's format is recognised by its first bytes, behind any compression.

text              one document
JSON lines        one object a line, whose text field is a document
JSON              an array of objects, or pretty-printed objects that have the text field
CSV, TSV          one row a document, of the text column; recognised by suffix, for their content may be any text
Parquet           one row a document, of the text column
datasets folder   as `Dataset.save_to_disk` leaves it: one row a document
Hugging Face hub  as `datasets` streams it: one row a document

To add one: docs/extending.md, "A data format".
"""

import itertools
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

from gpt.data.prepare.compression import detect_compression, open_bytes, remove_compression_suffix
from gpt.data.prepare.documents import TextDocument
from gpt.data.prepare.foreign import refuse_foreign_format
from gpt.data.prepare.json_values import DECODER, read_json_values
from gpt.data.prepare.records import BadFileError, Records, is_unicode, reraise_as_user_error, shorten
from gpt.data.prepare.token_files import HEAD_BYTES, is_token_file, is_token_index

MAX_LINE_BYTES = 2**30
"""Bytes of one JSON object; a longer line is an error and is not read into memory."""
READ_BYTES = 2**20

PARQUET_MAGIC = b"PAR1"
JSON_LINES_SUFFIXES = {".jsonl", ".ndjson", ".jsonlines"}
TABLE_SUFFIXES = {".csv", ".tsv", ".tab"}
BLANKS = b"\xef\xbb\xbf \t\r\n"
"""Byte order mark and spaces, which may come before a JSON value."""
JSON_ARRAY_START = re.compile(rb"(\xef\xbb\xbf)?\s*\[\s*\{")
JSON_OBJECT_START = re.compile(rb'(\xef\xbb\xbf)?\s*\{\s*"')

Format = Literal["text", "json-lines", "json", "table", "parquet", "tokens", "binary", "token-index"]
COMPRESSIBLE_KINDS = ("text", "json-lines", "json", "table")
"""Kinds of files that are read through a decompressor."""
RECORD_KINDS = ("json-lines", "json", "table", "parquet", "dataset", "hub")
"""Kinds of files whose records have a text field."""


def detect_format(path: Path, text_field: str = "text") -> Format:
    """Return the format of a file.

    Args:
        path: the file.
        text_field: key by which pretty-printed objects are records, and not a text.

    Raises:
        UserError: the file cannot be read, or has a format that is known and not read.
    """
    with reraise_as_user_error(path):
        with path.open("rb") as file:
            head = file.read(HEAD_BYTES)
        if head.startswith(PARQUET_MAGIC):
            return "parquet"
        if is_token_index(path, head):
            return "token-index"
        refuse_foreign_format(path, head)
        if is_token_file(path, head):
            return "tokens"
        is_compressed = detect_compression(path, head) is not None
        name = remove_compression_suffix(path)
        with open_bytes(path) as stream:
            head = stream.read(HEAD_BYTES)
            if head.startswith(b"{") and b"\n" not in head:  # the first object may be longer than the head
                head += stream.readline(MAX_LINE_BYTES)
        refuse_foreign_format(path, head)
        if is_compressed:
            _refuse_compressed_binary(path, name, head)
        if _is_json(head, name, path, text_field):
            return "json"
        if _is_json_lines(head, path):
            return "json-lines"
        if name.suffix.lower() in TABLE_SUFFIXES:
            return "table"
        return "binary" if b"\0" in head else "text"  # the rule of git


def has_json_lines_name(path: Path) -> bool:
    """Return whether a file has a suffix of JSON lines, which is meant for records and nothing else."""
    return bool(JSON_LINES_SUFFIXES.intersection(path.suffixes))


def read_first_values(path: Path, count: int) -> list[object]:
    """Return the first values of a JSON file, or the first elements of its array.

    Raises:
        ValueError, RecursionError: the content is no JSON.
    """
    with open_bytes(path) as file:
        return list(itertools.islice(read_json_values(file), count))


def _refuse_compressed_binary(path: Path, name: Path, head: bytes) -> None:
    """Refuse compressed content that is read at any position and so only as it is, or that is compressed twice.

    Args:
        path: the file.
        name: its path without the suffix of the compression.
        head: first bytes of its content.

    Raises:
        BadFileError: names the content.
    """
    if head.startswith(PARQUET_MAGIC):
        what = "Parquet in a compressed file"
    elif is_token_file(name, head):
        what = "tokens in a compressed file"
    elif detect_compression(name, head) is not None:
        what = "compressed twice"
    else:
        return
    raise BadFileError(f"{shorten(path)} is {what}; decompress it once", is_foreign=True)


def require_utf8(path: Path) -> None:
    """Check the encoding of a text.

    Raises:
        BadFileError: the bytes are not UTF-8; names the offset.
    """
    with reraise_as_user_error(path), open_bytes(path) as file:
        start, rest = 0, b""
        while block := file.read(READ_BYTES):
            content = rest + block
            n_whole = len(content) if content.isascii() else _find_last_character(content)
            _decode(content[:n_whole], path, start)
            start, rest = start + n_whole, content[n_whole:]
        _decode(rest, path, start)


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
    with records.refuse_bad_file(path), open_bytes(path) as file:
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
        record = DECODER.decode(line.decode(json.detect_encoding(line), "surrogatepass"))
        text = record.get(records.text_field) if type(record) is dict else None
        if type(text) is str and text and is_unicode(text):  # the usual case, kept fast
            yield TextDocument(name, text)
        else:
            yield from records.read_document(
                record, f"{shorten(path)}: line {_line_in_file(path, start, number)}", name
            )
    except (ValueError, RecursionError) as error:
        reason = "not UTF-8; convert the file to UTF-8" if isinstance(error, UnicodeDecodeError) else error
        records.refuse(f"{shorten(path)}: line {_line_in_file(path, start, number)}: not valid JSON: {reason}")


def _line_in_file(path: Path, start: int, number: int) -> int:
    """Return the number in the file of line `number` after byte `start`; counted only for error messages."""
    before = 0
    with path.open("rb") as file:
        while start > 0 and (block := file.read(min(start, 2**20))):
            before += block.count(b"\n")
            start -= len(block)
    return before + number


def read_json(path: Path, name: str, records: Records) -> Iterator[TextDocument]:
    """Yield the documents of the records of a JSON array, or of pretty-printed records.

    Raises:
        UserError: a record has no text, or the file is damaged; names the record.
    """
    number = 0
    with records.refuse_bad_file(path), open_bytes(path) as file:
        try:
            for number, record in enumerate(read_json_values(file), 1):
                yield from records.read_document(record, f"{shorten(path)}: record {number}", f"{name}:{number - 1}")
        except (ValueError, RecursionError) as error:
            records.refuse(f"{shorten(path)}: record {number + 1}: not valid JSON: {shorten(error)}")


def _decode(content: bytes, path: Path, start: int) -> str:
    """Decode UTF-8 without changing a byte, such as a byte order mark or the end of a line."""
    try:
        return content.decode("utf-8")
    except UnicodeDecodeError as error:
        byte, at = content[error.start], start + error.start
        raise BadFileError(
            f"{shorten(path)}: not UTF-8 at byte offset {at} (0x{byte:02x}); convert the file to UTF-8"
        ) from error


def _is_json_lines(head: bytes, path: Path) -> bool:
    """Return whether a file has a suffix of JSON lines, or starts with an object on a line of its own."""
    if has_json_lines_name(path):
        return True
    first, _, rest = head.partition(b"\n")
    return first.lstrip(BLANKS)[:1] == b"{" and _is_json_value(first) and rest.lstrip()[:1] in (b"", b"{")


def _is_json(head: bytes, name: Path, path: Path, text_field: str) -> bool:
    """Return whether a file is an array of objects, or has pretty-printed objects with the text field."""
    is_json_name = name.suffix.lower() == ".json"
    if JSON_ARRAY_START.match(head) or (is_json_name and head.lstrip().startswith(b"[")):
        return True
    if not JSON_OBJECT_START.match(head) or _is_json_value(head.lstrip(BLANKS).partition(b"\n")[0]):
        return False
    try:
        first = read_first_values(path, 1)
    except (ValueError, RecursionError):
        return False
    return any(isinstance(record, dict) and text_field in record for record in first)


def _is_json_value(line: bytes) -> bool:
    try:
        DECODER.decode(line.decode(json.detect_encoding(line), "surrogatepass"))
    except (ValueError, RecursionError):
        return False
    return True


def _find_last_character(content: bytes) -> int:
    """Return the start of the last character of a block of UTF-8, which may be cut."""
    at = len(content) - 1
    while at > max(0, len(content) - 4) and content[at] & 0xC0 == 0x80:
        at -= 1
    return at
