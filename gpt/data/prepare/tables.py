"""Rows -> documents: CSV, Parquet, saved datasets and streams. Only the text column is read and decoded."""

import codecs
import csv
import io
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from gpt.data.prepare.compression import open_bytes, remove_compression_suffix
from gpt.data.prepare.documents import TextDocument
from gpt.data.prepare.optional import import_extra
from gpt.data.prepare.records import BadFileError, NotUtf8, Records, is_unicode, join, reraise_as_user_error, shorten
from gpt.errors import UserError

MAX_FIELD_LETTERS = 2**30
"""Letters of one field of CSV; a longer one is an error."""
ROWS_PER_BATCH = 1024
UTF16_MARKS = (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)
DELIMITERS = ",;\t|"
"""Delimiters of CSV, by preference; TSV has tabs."""


class ColumnError(BadFileError):
    """Error that a file has no column of the name that was asked for."""


def read_table_header(path: Path, text_field: str) -> tuple[list[str], str]:
    """Return the names of the columns of CSV or TSV, and the delimiter.

    Raises:
        BadFileError: the file is damaged, or has no such column.
    """
    with reraise_as_user_error(path), open_bytes(path) as file:
        if file.read(2) in UTF16_MARKS:
            raise BadFileError(f"{shorten(path)}: its encoding is UTF-16; convert the file to UTF-8")
    is_tsv = remove_compression_suffix(path).suffix.lower() in (".tsv", ".tab")
    csv.field_size_limit(MAX_FIELD_LETTERS)
    headers = []
    for delimiter in "\t" if is_tsv else DELIMITERS:
        with reraise_as_user_error(path), _open_lines(path) as lines:
            headers.append((next(csv.reader(lines, delimiter=delimiter), []), delimiter))
    for header, delimiter in headers:
        if text_field in header:
            return header, delimiter
    columns = max((header for header, _ in headers), key=len)
    raise _column_error(path, text_field, columns)


def read_table(path: Path, name: str, records: Records) -> Iterator[TextDocument]:
    """Yield the documents of the rows of a CSV or TSV file.

    Raises:
        UserError: the file is damaged, or a row has no text; names the line.
    """
    with records.refuse_bad_file(path), _open_lines(path) as lines:
        header, delimiter = read_table_header(path, records.text_field)
        column, number = header.index(records.text_field), 0
        rows = csv.reader(lines, delimiter=delimiter, strict=True)
        next(rows)
        while True:
            place = f"{shorten(path)}: line {rows.line_num + 1}"
            try:
                row = next(rows, None)
            except csv.Error as error:
                records.refuse(f"{place}: not valid CSV: {error}")
                continue
            if row is None:
                return
            if len(row) > len(header):
                records.refuse(f"{place}: {len(row)} fields, but the header has {len(header)}; quote the field")
            elif len(row) > column:
                value = row[column] if is_unicode(row[column]) else NotUtf8()
                yield from records.read_value(value, place, f"{name}:{number}")
            elif row:
                records.refuse(f"{place}: {len(row)} fields, but {records.text_field!r} is field {column + 1}")
            number += 1


def require_column(path: Path, text_field: str) -> None:
    """Check that a Parquet file or a saved dataset has a column.

    Raises:
        ColumnError: it has none of this name.
        UserError: it cannot be read.
    """
    names = open_dataset(path).column_names if path.is_dir() else _open_parquet(path).schema_arrow.names
    if text_field not in names:
        raise _column_error(path, text_field, names)


def read_row_group_sizes(path: Path, text_field: str) -> list[int]:
    """Return the bytes of each row group of a Parquet file.

    Raises:
        UserError: the file cannot be read or has no such column.
    """
    require_column(path, text_field)
    with reraise_as_user_error(path):
        file = _open_parquet(path)
        return [file.metadata.row_group(group).total_byte_size for group in range(file.num_row_groups)]


def read_parquet(path: Path, name: str, records: Records, start: int, stop: int) -> Iterator[TextDocument]:
    """Yield the documents of the row groups [start, stop) of a Parquet file.

    Raises:
        UserError: the file is damaged, or a row has no text.
    """
    with records.refuse_bad_file(path):
        file = _open_parquet(path)
        number = sum(file.metadata.row_group(group).num_rows for group in range(start))
        for batch in file.iter_batches(
            batch_size=ROWS_PER_BATCH, row_groups=range(start, stop), columns=[records.text_field], use_threads=False
        ):
            for value in _to_values(batch.column(0)):
                yield from records.read_value(value, f"{shorten(path)}: row {number}", f"{name}:{number}")
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
    require_column(folder, records.text_field)
    dataset, number = open_dataset(folder), start
    with records.refuse_bad_file(folder):
        column = dataset.select_columns([records.text_field]).with_format("arrow")
        for first in range(start, stop, ROWS_PER_BATCH):
            for value in _to_values(column[first : min(first + ROWS_PER_BATCH, stop)].column(0)):
                yield from records.read_value(value, f"{shorten(folder)}: row {number}", f"{number}")
                number += 1


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
        if records.text_field in (stream.features or ()):
            stream = stream.select_columns([records.text_field])
        rows = stream.shard(n_shards, shard) if n_shards > 1 else stream
        for number, row in enumerate(rows):
            yield from records.read_document(row, f"{place}: row {number} of shard {shard}", f"{shard}:{number}")


def _open_parquet(path: Path) -> Any:
    with reraise_as_user_error(path):
        return import_extra("pyarrow.parquet", "parquet", str(path)).ParquetFile(path)


def _to_values(column: Any) -> list[object]:
    """Return the values of a column of Arrow; a string that is not UTF-8 spoils no other."""
    try:
        return list(column.to_pylist())
    except UnicodeDecodeError:
        return [_to_value(scalar) for scalar in column]


def _to_value(scalar: Any) -> object:
    try:
        return scalar.as_py()
    except UnicodeDecodeError:
        return NotUtf8()


def _open_lines(path: Path) -> io.TextIOWrapper:
    return io.TextIOWrapper(open_bytes(path), encoding="utf-8-sig", errors="surrogateescape", newline="")


def _column_error(path: Path, text_field: str, columns: list[str]) -> ColumnError:
    return ColumnError(f"{shorten(path)}: no column {text_field!r}; set --data.text-field to one of: {join(columns)}")
