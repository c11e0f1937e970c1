import logging
import os
import struct
from collections.abc import Sequence
from pathlib import Path

import datasets
import pytest

from gpt.configs.data_config import STDLIB
from gpt.data.prepare.documents import Document
from gpt.data.prepare.folders import is_run
from gpt.data.prepare.sources import EXCLUDED_FROM_STDLIB, find_source, require_apart
from gpt.errors import UserError
from tests.conftest import read_documents


def list_names(documents: Sequence[Document]) -> list[str]:
    return [document.name for document in documents]


def test_stdlib_excludes_tests_and_tables() -> None:
    documents = read_documents(STDLIB)
    assert {"argparse.py", "json/decoder.py"} <= set(list_names(documents))
    assert not [name for name in list_names(documents) if EXCLUDED_FROM_STDLIB.intersection(Path(name).parts)]
    assert all(name.endswith(".py") for name in list_names(documents))
    assert sum(document.size for document in documents) > 4_000_000


def test_files_of_a_folder_are_in_the_order_of_names(tmp_path: Path) -> None:
    for name in ("b.txt", "a.py", "sub/c.md", "sub/.hidden", ".git/config", "__pycache__/x.py", "empty.txt"):
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.write_text("" if name.startswith("empty") else name)
    (tmp_path / "picture.png").write_bytes(b"\x89PNG\0\0")
    assert list_names(read_documents(tmp_path)) == ["a.py", "b.txt", "sub/c.md"]


def test_text_is_kept_byte_for_byte(tmp_path: Path) -> None:
    path = tmp_path / "t.txt"
    content = "\ufeffa\r\nb\0é🙂\n".encode()
    path.write_bytes(content)
    assert [document.content for document in read_documents(path)] == [content]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", r"--data.source .*t.txt: the file is empty"),
        (b"ok \xff\xfe", r"t.txt: not UTF-8 at byte offset 3 \(0xff\)"),
        (None, r"--data.source .*t.txt: no such file or folder"),
    ],
)
def test_bad_file_is_named(tmp_path: Path, content: bytes | None, message: str) -> None:
    path = tmp_path / "t.txt"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(UserError, match=message):
        read_documents(path)


@pytest.mark.parametrize("offset", [0, 9, 2**20 - 1, 2**20, 3_000_000])
def test_file_of_another_encoding_in_a_folder_is_left_out_and_named(tmp_path: Path, offset: int) -> None:
    (tmp_path / "good.txt").write_text("good \N{GRINNING FACE}" * 300_000)
    (tmp_path / "bad.txt").write_bytes(b"x" * offset + b"\xe9t\xe9" + b"y" * 100)
    source = find_source(str(tmp_path))
    assert [file.name for file in source.files] == ["good.txt"]
    assert source.left_out == (f"bad.txt (not UTF-8 at byte offset {offset} (0xe9); convert the file to UTF-8)",)
    (tmp_path / "good.txt").unlink()
    with pytest.raises(UserError, match=rf"bad.txt: not UTF-8 at byte offset {offset}"):
        find_source(str(tmp_path))


def test_pipes_and_broken_links_are_ignored(tmp_path: Path) -> None:
    (tmp_path / "good.txt").write_text("good")
    (tmp_path / "link.txt").symlink_to(tmp_path / "none")
    os.mkfifo(tmp_path / "pipe.txt")
    assert list_names(read_documents(tmp_path)) == ["good.txt"]
    with pytest.raises(UserError, match=r"pipe.txt is neither a file nor a folder"):
        find_source(str(tmp_path / "pipe.txt"))


def test_file_names_may_be_invalid_unicode(tmp_path: Path) -> None:
    Path(os.fsdecode(os.fsencode(tmp_path) + b"/caf\xe9.txt")).write_text("good")
    assert len(find_source(str(tmp_path)).sha256) == 64
    assert [document.content for document in read_documents(tmp_path)] == [b"good"]


def test_too_long_name_is_reported() -> None:
    with pytest.raises(UserError, match="cannot be read: File name too long"):
        find_source("x" * 300)


def test_folder_without_text_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="the folder holds no text"):
        find_source(str(tmp_path))


def test_message_names_the_flag_of_a_validation_source(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"^--data.val-source .*none: no such file or folder"):
        find_source(str(tmp_path / "none"), "--data.val-source")


def test_name_of_a_source_has_no_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "book.txt").write_text("text")
    assert find_source(str(tmp_path / "book.txt")).name == "book"
    monkeypatch.chdir(tmp_path)
    assert find_source(".").name == tmp_path.name


def test_fingerprint_depends_on_names_texts_and_file_boundaries(tmp_path: Path) -> None:
    variants = [{"a": "bc"}, {"ab": "c"}, {"a": "bd"}, {"a": "b", "c": "c"}, {"a": "b", "c": "d"}]
    digests = []
    for index, files in enumerate(variants):
        (tmp_path / str(index)).mkdir()
        for name, content in files.items():
            (tmp_path / str(index) / name).write_text(content)
        digests.append(find_source(str(tmp_path / str(index))).sha256)
    assert len(set(digests)) == len(variants)
    (tmp_path / "4").rename(tmp_path / "elsewhere")
    assert find_source(str(tmp_path / "elsewhere")).sha256 == digests[4]


def test_fingerprint_depends_on_the_index_of_a_token_file(tmp_path: Path) -> None:
    def write(documents: list[int]) -> str:
        header = b"MMIDIDX\0\0" + struct.pack("<QBQQ", 1, 4, 2, len(documents))
        body = struct.pack(f"<2i2q{len(documents)}q", 3, 3, 0, 12, *documents)
        (tmp_path / "m.idx").write_bytes(header + body)
        (tmp_path / "m.bin").write_bytes(struct.pack("<6i", 1, 2, 3, 4, 5, 6))
        return find_source(str(tmp_path / "m.bin")).sha256

    assert write([0, 1, 2]) != write([0, 2])
    with pytest.raises(UserError, match=r"m.idx is the index of a token file; name the .bin file beside it"):
        find_source(str(tmp_path / "m.idx"))


def test_fingerprint_of_a_dataset_depends_on_rows_and_not_on_the_folder(tmp_path: Path) -> None:
    for name, text in (("one", "a"), ("two", "b")):
        datasets.Dataset.from_dict({"text": [text]}).save_to_disk(str(tmp_path / name))
    digests = [find_source(str(tmp_path / name)).sha256 for name in ("one", "two")]
    (tmp_path / "one").rename(tmp_path / "three")
    assert digests[0] != digests[1]
    assert find_source(str(tmp_path / "three")).sha256 == digests[0]


@pytest.mark.parametrize("address", ["hf:", "hf::config"])
def test_dataset_address_without_a_name_is_refused(address: str) -> None:
    with pytest.raises(UserError, match=rf"{address}: name a dataset: hf:NAME"):
        find_source(address)


def make_run(folder: Path, *, records: str = "lineage.jsonl") -> Path:
    folder.mkdir(parents=True)
    (folder / "config.json").write_text("{}")
    (folder / "metrics.jsonl").write_text('{"text": "a metric"}\n')
    (folder / records).mkdir() if records == "checkpoints" else (folder / records).touch()
    return folder


@pytest.mark.parametrize("records", ["lineage.jsonl", "checkpoints"])
def test_run_in_a_folder_of_texts_is_left_out_and_named(
    records: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    (tmp_path / "a.txt").write_text("a text")
    expected = find_source(str(tmp_path))
    runs = [make_run(tmp_path / name, records=records) for name in ("run", "sub/run")]
    assert find_source(str(tmp_path)) == expected
    assert caplog.messages == [f"{tmp_path}: left out 2 runs: {runs[0]}, {runs[1]}"]


def test_run_is_no_source(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    with pytest.raises(UserError, match=f"--data.source {run} is the folder of a run, not of texts; name the texts"):
        find_source(str(run))
    checkpoint = run / "checkpoints" / "step_00000001"
    checkpoint.mkdir(parents=True)
    (checkpoint / "progress.json").write_text("{}")
    for folder in (checkpoint, checkpoint.parent):
        with pytest.raises(UserError, match=f"--data.source {folder} is the folder of a run, not of texts"):
            find_source(str(folder))


def test_missing_source_names_what_may_be_meant(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("a", "b"):
        Path(name).write_text("a text")
    for source, remedy in (
        ("a,b", "separate several sources by spaces"),
        ("a,c", "name a text file, a folder or stdlib"),
        ("x/tinyshakespeare.txt", "the source shakespeare downloads it"),
    ):
        with pytest.raises(UserError, match=f"^--data.source {source}: no such file or folder; {remedy}$"):
            find_source(source)


def test_folder_of_texts_with_a_config_is_no_run(tmp_path: Path, finished_run: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    assert not is_run(tmp_path)
    assert is_run(finished_run)


def test_folder_to_write_to_may_not_be_at_in_or_above_a_source(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("parent/texts/.hidden").mkdir(parents=True)
    Path("parent/book.txt").write_text("a text")
    Path("link").symlink_to("parent/texts")
    texts = str(Path("parent/texts").absolute())
    for folder, sources, reason in (
        ("parent/texts", [texts], f"is the source {texts} itself"),
        ("link", [texts], f"is the source {texts} itself"),
        ("parent/texts/runs/x", ["stdlib", texts], f"lies in the source {texts}"),
        ("link/run", ["parent/texts"], "lies in the source parent/texts"),
        ("runs/quickstart", ["."], "lies in the source ."),
        ("parent", [texts], f"holds the source {texts}"),
        (".", ["parent/book.txt"], "holds the source parent/book.txt"),
    ):
        with pytest.raises(UserError) as error:
            require_apart(Path(folder), "--run-dir", sources)
        assert str(error.value).startswith(f"--run-dir {folder} {reason}; name ")
    for folder, sources in (
        ("runs/x", [texts, "parent/book.txt", "stdlib", "hf:x", "none"]),
        ("parent/run", [texts]),
        ("parent/texts-run", [texts]),
        ("parent/texts/.hidden/run", [texts]),
    ):
        require_apart(Path(folder), "--run-dir", sources)
    require_apart(Path("parent"), "--out", [texts], below_only=True)
