import csv
import gzip
import json
from pathlib import Path
from typing import Any

import datasets
import pyarrow
import pyarrow.parquet
import pytest
from datasets.table import InMemoryTable

from gpt.data.prepare.records import Records
from gpt.errors import UserError
from tests.conftest import read_documents
from tests.data.prepare.prepared import prepare

TEXTS = ["plain", 'with "quotes", a comma\tand a tab', "two\nlines\r\n", "é🙂" * 100_000]


def read(path: Path, text_field: str = "text", *, skip_bad: bool = False) -> list[str]:
    return [document.content.decode() for document in read_documents(path, Records(text_field, skip_bad=skip_bad))]


@pytest.mark.parametrize(
    ("name", "delimiter"), [("t.csv", ","), ("t.csv", ";"), ("t.tsv", "\t"), ("t.csv.gz", ","), ("T.CSV", ",")]
)
@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig"])
def test_rows_of_csv_are_documents(tmp_path: Path, name: str, delimiter: str, encoding: str) -> None:
    opened: Any = gzip.open if name.endswith(".gz") else open
    with opened(tmp_path / name, "wt", newline="", encoding=encoding) as file:
        rows = csv.writer(file, delimiter=delimiter)
        rows.writerow(["text", "id"])
        rows.writerows([text, index] for index, text in enumerate(TEXTS))
    assert read(tmp_path / name) == TEXTS
    assert read(tmp_path) == TEXTS
    with pytest.raises(UserError, match=rf"{name}: no column 'body'; set --data.text-field to one of: text, id"):
        read(tmp_path / name, "body")


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b"1,2,three", "line 3: 3 fields, but the header has 2; quote the field"),
        (b"1", "line 3: 1 fields, but 'text' is field 2"),
        (b'1,"two"3', "line 3: not valid CSV"),
        (b"1,\xe9", "line 3: no text under 'text': it holds bytes that are not UTF-8"),
    ],
)
def test_bad_row_of_csv_is_named_or_skipped(tmp_path: Path, line: bytes, message: str) -> None:
    path = tmp_path / "t.csv"
    path.write_bytes(b"id,text\n0,one\n" + line + b"\n2,three\n")
    with pytest.raises(UserError, match=f"t.csv: {message}.*--data.on-error skip"):
        read(path)
    assert read(path, skip_bad=True) == ["one", "three"]


def test_nul_in_a_table_makes_it_no_text(tmp_path: Path) -> None:
    (tmp_path / "t.csv").write_bytes(b"id,text\n1,a\0b\n")
    assert read(tmp_path / "t.csv") == ["a\0b"]


@pytest.mark.parametrize(("name", "place"), [("t.csv", "its encoding is UTF-16"), ("t.jsonl", "line 1: .* not UTF-8")])
def test_records_in_utf16_name_the_remedy(tmp_path: Path, name: str, place: str) -> None:
    content = "id,text\n1,a\n" if name == "t.csv" else '{"text": "a"}\n{"text": "b"}\n'
    (tmp_path / name).write_text(content, encoding="utf-16")
    with pytest.raises(UserError, match=rf"{place}; convert the file to UTF-8"):
        read(tmp_path / name)


@pytest.mark.parametrize("indent", [None, 2])
@pytest.mark.parametrize("name", ["t.json", "t.json.gz", "t.jsonl", "t.txt"])
def test_elements_of_a_json_array_are_documents(tmp_path: Path, name: str, indent: int | None) -> None:
    records = [{"id": index, "text": text, "more": [{}, [], "]"]} for index, text in enumerate(TEXTS * 5)]
    content = json.dumps(records, indent=indent)
    (tmp_path / name).write_bytes(gzip.compress(content.encode()) if name.endswith(".gz") else content.encode())
    assert read(tmp_path / name) == TEXTS * 5
    with pytest.raises(UserError, match=rf"{name}: record 1: no text under 'body'; .* to one of: id, text, more"):
        read(tmp_path / name, "body")


def test_pretty_printed_records_are_documents(tmp_path: Path) -> None:
    path = tmp_path / "t.json"
    path.write_text("\n".join(json.dumps({"text": text}, indent=2) for text in TEXTS))
    assert read(path) == TEXTS
    with pytest.raises(UserError, match=r"t.json: a JSON object with no text under 'body'; .* to one of: text"):
        read(path, "body")


@pytest.mark.parametrize(
    ("end", "message"),
    [
        ("", "ends in the middle of an array"),
        (', {"text": "cu', "Unterminated string"),
        (', {"text" 5}]', "Expecting ':'"),
        ("] and more", "'a' after the end of the array"),
        (' {"text": "b"}]', "instead of , or ]"),
        ("," + "[" * 100_000, "recursion"),
    ],
)
def test_damaged_json_array_is_named_or_skipped(tmp_path: Path, end: str, message: str) -> None:
    path = tmp_path / "t.json"
    path.write_text('[{"text": "one"}, {"text": "two"}' + end)
    with pytest.raises(UserError, match=rf"t.json: record 3: not valid JSON: .*{message}"):
        read(path)
    records = Records("text", skip_bad=True)
    assert [document.content for document in read_documents(path, records)] == [b"one", b"two"]
    assert records.skipped == 1


def test_huge_integer_beside_a_text_is_valid(tmp_path: Path) -> None:
    (tmp_path / "t.jsonl").write_text('{"text": "fine", "id": ' + "9" * 5000 + "}\n")
    (tmp_path / "t.json").write_text('[{"text": "fine", "id": ' + "9" * 5000 + "}]\n")
    assert read(tmp_path / "t.jsonl") == read(tmp_path / "t.json") == ["fine"]


def write_bad_utf8(path: Path) -> Path:
    column = pyarrow.array([b"good", b"bad \xff", b"fine"], pyarrow.binary())
    table = pyarrow.table({"text": pyarrow.Array.from_buffers(pyarrow.string(), 3, column.buffers())})
    if path.suffix == ".parquet":
        pyarrow.parquet.write_table(table, path)
    else:
        datasets.Dataset(InMemoryTable(table)).save_to_disk(str(path))
    return path


@pytest.mark.parametrize("name", ["t.parquet", "saved"])
def test_row_that_is_not_utf8_is_one_bad_record(tmp_path: Path, name: str) -> None:
    path = write_bad_utf8(tmp_path / name)
    with pytest.raises(UserError, match=rf"{name}: row 1: no text under 'text': it holds bytes that are not UTF-8"):
        read(path)
    assert read(path, skip_bad=True) == ["good", "fine"]


@pytest.mark.parametrize(
    ("value", "kind"),
    [
        (None, "null"),
        (b"bytes", "bytes"),
        ([1], "a list"),
        (float("nan"), "NaN"),
        (7, "a number"),
        ({"a": 1}, "an object"),
    ],
)
def test_value_that_is_no_string_is_described(tmp_path: Path, value: object, kind: str) -> None:
    path = tmp_path / "t.parquet"
    pyarrow.parquet.write_table(pyarrow.table({"text": pyarrow.array([value, value])}), path)
    with pytest.raises(UserError, match=rf"t.parquet: row 0: no text under 'text': it holds {kind}, not a string"):
        read(path)


def test_only_the_text_column_of_a_dataset_is_decoded(tmp_path: Path) -> None:
    features = datasets.Features({"text": datasets.Value("string"), "image": datasets.Image()})
    kind = pyarrow.struct([("bytes", pyarrow.binary()), ("path", pyarrow.string())])
    pictures = pyarrow.array([{"bytes": b"no picture", "path": None}] * 2, type=kind)
    table = pyarrow.table({"text": ["one", "two"], "image": pictures}).cast(features.arrow_schema)
    info = datasets.DatasetInfo(features=features)
    datasets.Dataset(InMemoryTable(table), info=info).save_to_disk(str(tmp_path / "saved"))
    assert read(tmp_path / "saved") == ["one", "two"]
    with pytest.raises(UserError, match=r"saved: no column 'body'; set --data.text-field to one of: text, image"):
        read(tmp_path / "saved", "body")


def test_text_field_without_records_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("a text " * 50)
    (tmp_path / "b.jsonl").write_text('{"body": "a record"}\n' * 20)
    with pytest.raises(UserError, match=r"--data.text-field body: a holds no records, only text or tokens"):
        prepare(tmp_path / "out", [tmp_path / "a.txt"], text_field="body")
    assert prepare(tmp_path / "out", [tmp_path / "a.txt", tmp_path / "b.jsonl"], text_field="body").documents > 20


@pytest.mark.parametrize("name", ["t.jsonl", "t.json", "t.csv"])
def test_message_is_short_whatever_the_input(tmp_path: Path, name: str) -> None:
    folder = tmp_path / ("d" * 200) / ("e" * 200)
    folder.mkdir(parents=True)
    keys = [f"key {index} \n" + "k" * 300 for index in range(5000)]
    path = folder / name
    if name == "t.csv":
        with path.open("w", newline="") as file:
            csv.writer(file).writerows([keys, keys])
    else:
        record = dict.fromkeys(keys, "x")
        path.write_text(json.dumps([record] if name == "t.json" else record))
    with pytest.raises(UserError, match=r"set --data.text-field to one of: .* and 4,995 more") as error:
        read(path)
    assert len(str(error.value)) < 380
    assert "\n" not in str(error.value)
