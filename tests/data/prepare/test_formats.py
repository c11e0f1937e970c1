import gzip
import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import datasets
import pyarrow
import pyarrow.parquet
import pytest
import zstandard

from gpt.configs.data_config import DataConfig
from gpt.data.corpus import open_corpus, prepare_corpus
from gpt.data.prepare import formats
from gpt.data.prepare.documents import TextDocument
from gpt.data.prepare.records import Records
from gpt.data.prepare.sources import find_source
from gpt.errors import UserError
from tests.conftest import read_documents

TEXTS = ["first text\n", "zweiter Text: é🙂\u2028", "third\r\n{}"]


def read(path: Path | str, text_field: str = "text") -> list[str]:
    return [document.content.decode() for document in read_documents(path, Records(text_field, skip_bad=False))]


def json_lines(field: str = "text") -> bytes:
    return "".join(json.dumps({"id": i, field: text}) + "\n" for i, text in enumerate(TEXTS)).encode()


def write_parquet(path: Path) -> None:
    pyarrow.parquet.write_table(pyarrow.table({"id": [0, 1, 2], "text": TEXTS}), path, row_group_size=2)


def write_dataset(path: Path) -> None:
    datasets.Dataset.from_dict({"id": [0, 1, 2], "text": TEXTS}).save_to_disk(str(path))


WRITERS: dict[str, Callable[[Path], object]] = {
    "t.jsonl": lambda path: path.write_bytes(json_lines()),
    "t.jsonl.gz": lambda path: path.write_bytes(gzip.compress(json_lines())),
    "t.jsonl.zst": lambda path: path.write_bytes(zstandard.compress(json_lines())),
    "t.parquet": write_parquet,
    "saved": write_dataset,
}


@pytest.mark.parametrize("name", WRITERS)
def test_every_format_gives_the_same_documents(tmp_path: Path, name: str) -> None:
    WRITERS[name](tmp_path / name)
    assert read(tmp_path / name) == TEXTS


@pytest.mark.parametrize("name", ["t.jsonl", "t.jsonl.gz", "t.jsonl.zst", "t.parquet"])
def test_format_is_recognised_by_content(tmp_path: Path, name: str) -> None:
    WRITERS[name](tmp_path / "data.bin")
    assert read(tmp_path / "data.bin") == TEXTS


def test_folder_may_mix_formats(tmp_path: Path) -> None:
    for name in ("t.jsonl", "t.jsonl.gz", "t.parquet"):
        WRITERS[name](tmp_path / name)
    (tmp_path / "plain.txt").write_text("plain")
    (tmp_path / "code.json").write_text('{\n  "pretty": 1\n}\n')
    assert read(tmp_path) == ['{\n  "pretty": 1\n}\n', "plain", *TEXTS * 3]


def test_compressed_text_is_one_document(tmp_path: Path) -> None:
    (tmp_path / "t.txt.gz").write_bytes(gzip.compress("Käse".encode()))
    assert read(tmp_path / "t.txt.gz") == ["Käse"]


def test_empty_text_is_no_document(tmp_path: Path) -> None:
    (tmp_path / "t.jsonl").write_text('\n{"text": ""}\n\n{"text": "one"}\n')
    assert read(tmp_path / "t.jsonl") == ["one"]
    (tmp_path / "t.txt.gz").write_bytes(gzip.compress(b""))
    assert read(tmp_path / "t.txt.gz") == []


@pytest.fixture(scope="module")
def hub(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Write two folders as a dataset of the hub has them, of several files."""
    root = tmp_path_factory.mktemp("hub")
    for name in ("json", "parquet"):
        (root / name).mkdir()
    for index in range(3):
        rows = [{"id": number, "text": f"document {index}.{number} é"} for number in range(4)]
        lines = "".join(json.dumps(row) + "\n" for row in rows)
        (root / "json" / f"train-{index:05d}-of-00003.jsonl").write_text(lines)
        pyarrow.parquet.write_table(
            pyarrow.Table.from_pylist(rows), root / "parquet" / f"train-{index:05d}-of-00003.parquet"
        )
    (root / "parquet" / "validation-00000-of-00001.parquet").write_bytes(
        (root / "parquet" / "train-00002-of-00003.parquet").read_bytes()
    )
    return root


STREAMED = [f"document {index}.{number} é" for index in range(3) for number in range(4)]


@pytest.mark.parametrize("name", ["json", "parquet"])
def test_stream_yields_the_rows_of_its_files(hub: Path, name: str) -> None:
    address = f"hf:{hub / name}"
    assert find_source(address).files[0].size == 3  # files, each a part
    assert read(address) == STREAMED == datasets.load_dataset(str(hub / name), split="train")["text"][:]
    assert find_source(address).name == name


def test_stream_address_names_configuration_and_split(hub: Path) -> None:
    assert read(f"hf:{hub / 'parquet'}:default:validation") == STREAMED[-4:]
    with pytest.raises(UserError, match=r"hf:.*parquet:default:nothing: cannot be read"):
        read(f"hf:{hub / 'parquet'}:default:nothing")


def test_bad_record_of_a_stream_is_named(hub: Path) -> None:
    with pytest.raises(UserError, match=r"hf:.*json: row 0 of shard 0: no text under 'body'; .* to one of: id, text"):
        read(f"hf:{hub / 'json'}", "body")


def test_fingerprint_of_a_stream_depends_on_files_and_address(hub: Path, tmp_path: Path) -> None:
    shutil.copytree(hub / "parquet", tmp_path / "parquet")
    digests = [
        find_source(f"hf:{address}").sha256
        for address in (hub / "parquet", f"{hub / 'parquet'}:default:validation", tmp_path / "parquet", hub / "json")
    ]
    assert digests[0] == digests[2]
    assert len(set(digests)) == 3


def test_train_split_of_a_dataset_is_read(tmp_path: Path) -> None:
    one, two = (datasets.Dataset.from_dict({"text": [text]}) for text in ("one", "two"))
    datasets.DatasetDict({"test": one, "train": two}).save_to_disk(str(tmp_path / "both"))
    assert read(tmp_path / "both") == ["two"]
    datasets.DatasetDict({"test": one}).save_to_disk(str(tmp_path / "none"))
    with pytest.raises(UserError, match="no split is called train; name the folder of one: test"):
        read(tmp_path / "none")


def test_text_field_is_configurable(tmp_path: Path) -> None:
    (tmp_path / "t.jsonl").write_bytes(json_lines("body"))
    assert read(tmp_path / "t.jsonl", "body") == TEXTS
    with pytest.raises(UserError, match=r"line 1: no text under 'text'; set --data.text-field to one of: id, body"):
        read(tmp_path / "t.jsonl")
    write_parquet(tmp_path / "t.parquet")
    with pytest.raises(UserError, match=r"t.parquet: no column 'body'; .* to one of: id, text"):
        read(tmp_path / "t.parquet", "body")


BAD = [
    (b'{"text": "cut off', "not valid JSON"),
    (b"[1, 2]", "not a JSON object"),
    (b'{"text": 5}', "no text under 'text'"),
    (b'{"text": "\\ud800"}', "not valid Unicode"),
    (b'{"text": "\xff"}', "not valid JSON"),
    (b"[" * 100_000, "not valid JSON"),
]


@pytest.mark.parametrize(("line", "message"), BAD)
def test_bad_record_names_file_and_line(tmp_path: Path, line: bytes, message: str) -> None:
    path = tmp_path / "t.jsonl"
    path.write_bytes(json_lines() + b"\n" + line + b"\n")
    with pytest.raises(UserError, match=rf"{path}: line 5: {message}.*--data.on-error skip"):
        read(path)


def test_bad_records_are_skipped_and_counted_if_configured(tmp_path: Path) -> None:
    path = tmp_path / "t.jsonl"
    path.write_bytes(b"\n".join(line for line, _ in BAD) + b"\n" + json_lines())
    records = Records("text", skip_bad=True)
    assert [document.content.decode() for document in read_documents(path, records)] == TEXTS
    assert records.skipped == 6


def test_too_long_line_is_one_bad_record(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(formats, "MAX_LINE_BYTES", 100)
    path = tmp_path / "t.jsonl"
    path.write_bytes(b'{"text": "' + b"x" * 500 + b'"}\n' + b'{"text": "short"}\n')
    with pytest.raises(UserError, match=rf"{path}: line 1: not valid JSON: a line of 100 bytes or more"):
        read(path)
    assert [d.content for d in read_documents(path, Records("text", skip_bad=True))] == [b"short"]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("t.gz", gzip.compress(json_lines())[:-20], "cannot be read"),
        ("late.jsonl.gz", gzip.compress(json_lines() * 9000)[:-20], "cannot be read"),
        ("late.jsonl.zst", zstandard.compress(json_lines() * 9000)[:-20] + b"x" * 20, "cannot be read"),
        ("t.parquet", b"PAR1 and no more", "cannot be read"),
    ],
)
def test_damaged_file_is_named(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=rf"{name}: {message}"):
        read(tmp_path / name)


@pytest.mark.parametrize(
    ("name", "module", "extra"),
    [
        ("t.jsonl.zst", "zstandard", "zstd"),
        ("t.parquet", "pyarrow.parquet", "parquet"),
        ("saved", "datasets", "datasets"),
    ],
)
def test_missing_library_names_the_extra_to_install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, module: str, extra: str
) -> None:
    WRITERS[name](tmp_path / name)
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(UserError, match=rf"needs {module}; pip install 'gpt-training-pipeline\[{extra}\]'"):
        read(tmp_path / name)


def test_records_become_documents_of_the_corpus(tmp_path: Path) -> None:
    lines = [json.dumps({"body": f"document {index} " * (index % 7 + 1)}) for index in range(60)]
    (tmp_path / "t.jsonl").write_text("\n".join(lines))
    config = DataConfig(
        source=str(tmp_path / "t.jsonl"), text_field="body", tokenizer="byte", cache_dir=tmp_path / "cache"
    )
    facts = open_corpus(prepare_corpus(config), config, 8).facts
    assert 3 <= facts.val_documents <= 20
    assert facts.val_tokens == facts.val_bytes + facts.val_documents


def test_documents_are_named_by_the_offset_where_they_begin(tmp_path: Path) -> None:
    WRITERS["t.jsonl"](tmp_path / "t.jsonl")
    write_parquet(tmp_path / "t.parquet")
    second = json_lines().index(b"\n") + 1
    documents = read_documents(tmp_path)
    assert documents[1] == TextDocument(f"t.jsonl:{second}", TEXTS[1])
    assert documents[4] == TextDocument("t.parquet:1", TEXTS[1])
