import errno
import gzip
import json
import logging
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest

from gpt.configs.data_config import DataConfig
from gpt.data.corpus import open_corpus, prepare_corpus
from gpt.data.prepare import formats, parts, token_files
from gpt.data.prepare.part_worker import PartWorker
from gpt.data.prepare.records import Records
from gpt.data.prepare.sources import File, find_source
from gpt.data.prepare.workers import WorkerPool
from gpt.errors import UserError
from tests.data.prepare.prepared import decode_documents, prepare


def write_texts(folder: Path, *names: str) -> Path:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(f"text of {name}")
    return folder


def list_files(folder: Path) -> list[str]:
    return [file.name for file in find_source(str(folder)).files]


def test_linked_folders_are_followed_and_each_is_read_once(tmp_path: Path) -> None:
    write_texts(tmp_path / "real", "b.txt", "deep/c.txt")
    folder = write_texts(tmp_path / "texts", "a.txt", "sub/d.txt", "z/e.txt")
    for link, target in {
        "one": "../real",
        "two": "../real/deep",
        "again": "sub",
        "sub/up": "..",
        "broken": "none",
        "z/circle": "circle",
    }.items():
        (folder / link).symlink_to(target)
    (tmp_path / "real" / "back").symlink_to("../texts")
    assert list_files(folder) == ["a.txt", "one/b.txt", "one/deep/c.txt", "sub/d.txt", "z/e.txt"]


def test_link_above_a_folder_reads_none_of_it_twice(tmp_path: Path) -> None:
    write_texts(tmp_path, "b.txt")
    folder = write_texts(tmp_path / "texts", "a.txt", "sub/c.txt")
    (folder / "above").symlink_to("..")
    assert list_files(folder) == ["a.txt", "above/b.txt", "sub/c.txt"]


def test_folder_without_links_has_the_fingerprint_of_its_copy_with_one_folder_linked(tmp_path: Path) -> None:
    write_texts(tmp_path / "plain", "a.txt", "sub/b.txt")
    write_texts(tmp_path / "linked", "a.txt")
    (tmp_path / "linked" / "sub").symlink_to(tmp_path / "plain" / "sub")
    assert find_source(str(tmp_path / "plain")).sha256 == find_source(str(tmp_path / "linked")).sha256


@pytest.mark.parametrize("is_linked", [False, True])
def test_saved_datasets_below_a_folder_are_read(tmp_path: Path, is_linked: bool) -> None:
    above = write_texts(tmp_path / "above", "notes.txt")
    saved = (tmp_path if is_linked else above) / "saved"
    datasets.Dataset.from_dict({"text": ["one", "two"]}).save_to_disk(str(saved))
    if is_linked:
        (above / "saved").symlink_to(saved)
    datasets.DatasetDict({"train": datasets.Dataset.from_dict({"text": ["three"]})}).save_to_disk(str(above / "split"))
    assert [(file.name, file.kind, file.size) for file in find_source(str(above)).files] == [
        ("notes.txt", "text", 17),
        ("saved", "dataset", 2),
        ("split", "dataset", 1),
    ]
    prepare(tmp_path / "out", [above], val_fraction=0.0)
    assert decode_documents(tmp_path / "out", "train") == ["text of notes.txt", "one", "two", "three"]


def test_state_file_without_a_dataset_is_no_dataset(tmp_path: Path) -> None:
    write_texts(tmp_path, "sub/state.json", "sub/a.txt")
    assert list_files(tmp_path) == ["sub/a.txt", "sub/state.json"]


def test_prepared_folders_below_a_folder_are_found(tmp_path: Path) -> None:
    texts = write_texts(tmp_path / "texts", *(f"{index}.txt" for index in range(20)))
    for name in ("b", "a"):
        prepare(tmp_path / "above" / name, [texts])
    config = DataConfig(source=(str(tmp_path / "above"),), tokenizer="byte", cache_dir=tmp_path / "cache")
    folders = prepare_corpus(config)
    assert folders == [tmp_path / "above" / "a", tmp_path / "above" / "b"]
    assert open_corpus(folders, config, 8).facts.val_documents > 0
    assert not (tmp_path / "cache").exists()
    write_texts(tmp_path / "above", "notes.txt")
    source = find_source(str(tmp_path / "above"))
    assert [file.name for file in source.files] == ["notes.txt"]
    assert source.left_out == ("a (a prepared folder)", "b (a prepared folder)")


def write_odd_files(folder: Path) -> None:
    """Write files as a source tree has them as fixtures."""
    (folder / "odd.bin").write_bytes(b"\xff" * 1001)
    (folder / "even.bin").write_bytes(b"\xff" * 1000)
    (folder / "vocab.json").write_text(json.dumps({f"w{index}": index for index in range(5000)}))
    (folder / "generation_config.json").write_text('{"max_length": 5}')
    (folder / "rows.json").write_text('[{"question": "a"}]')
    (folder / "numbers.json").write_text("[1, 2, 3]")
    (folder / "table.csv").write_text("a,b\n1,2\n")
    (folder / "tokenizer.json").write_text('{\n  "version": "1.0",\n  "truncation": null,\n  "model": {}\n}')
    (folder / "dataset_info.json").write_text('{\n  "features": {}\n}')
    (folder / "latin.txt").write_bytes(b"caf\xe9")
    (folder / "notebook.ipynb").write_text('{"cells": [], "metadata": {}}')
    (folder / "manual.pdf").write_bytes(b"%PDF-1.7\n\xff")
    (folder / "table.parquet.gz").write_bytes(gzip.compress(b"PAR1" + bytes(100) + b"PAR1"))


@pytest.mark.parametrize("tokenizer", ["byte", "char", "bpe"])
def test_files_that_are_no_text_are_left_out_counted_and_named(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, tokenizer: str
) -> None:
    folder = write_texts(tmp_path / "tree", "a.py", "b.py")
    write_odd_files(folder)
    prepare(tmp_path / "out", [folder], tokenizer=tokenizer, val_fraction=0.0, vocab_size=300)
    assert sorted(decode_documents(tmp_path / "out", "train")) == ["text of a.py", "text of b.py"]
    (line,) = [message for message in caplog.messages if "left out" in message]
    assert line.startswith("tree: left out 13 files or folders: ")
    assert line.endswith(", ...")
    assert line.count("(") >= 3
    assert len(line) < 450


def test_only_file_of_a_folder_that_is_no_text_is_named_with_its_remedy(tmp_path: Path) -> None:
    folder = tmp_path / "texts"
    folder.mkdir()
    (folder / "rows.json").write_text('[{"question": "a", "answer": "b"}]')
    with pytest.raises(UserError, match=r"rows.json: no record with 'text'; set .* to one of: question, answer"):
        find_source(str(folder))
    (folder / "rows.json").rename(folder / "a.pdf")
    (folder / "a.pdf").write_bytes(b"%PDF-1.7\n\xff")
    with pytest.raises(UserError, match=r"a.pdf is a PDF; convert it with pdftotext"):
        find_source(str(folder))


@pytest.mark.parametrize("name", ["rows.parquet", "saved"])
def test_records_without_the_column_are_left_out_beside_text_alone(tmp_path: Path, name: str) -> None:
    folder = tmp_path / "tree"
    folder.mkdir()
    rows = datasets.Dataset.from_dict({"body": ["a", "b"]})
    rows.save_to_disk(str(folder / name)) if name == "saved" else rows.to_parquet(str(folder / name))
    write_texts(folder, "a.jsonl")
    (folder / "a.jsonl").write_text('{"text": "a"}')
    with pytest.raises(UserError, match=rf"{name}: no column 'text'; set --data.text-field to one of: body"):
        prepare(tmp_path / "out", [folder])
    write_texts(folder, "a.py")
    source = find_source(str(folder))
    assert [file.name for file in source.files] == ["a.jsonl", "a.py"]
    assert source.left_out == (f"{name} (no column 'text'; set --data.text-field to one of: body)",)


def test_tokens_beside_text_are_read_with_their_tokenizer(tmp_path: Path) -> None:
    folder = write_texts(tmp_path / "both", "a.txt")
    np.array([104, 255, 106], np.uint16).tofile(folder / "t.bin")
    prepare(tmp_path / "out", [folder], val_fraction=0.0)
    assert len(decode_documents(tmp_path / "out", "train")) == 2


def test_bad_files_of_a_folder_are_skipped_and_counted(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    folder = write_texts(tmp_path / "texts", "a.txt")
    (folder / "cut.txt.gz").write_bytes(gzip.compress(b"a text " * 1000)[:-9])
    (folder / "late.jsonl.gz").write_bytes(gzip.compress(b'{"text": "one"}\n' * 5000)[:-9])
    (folder / "t.parquet").write_bytes(b"PAR1 and no more")
    (folder / "secret.txt.zst").write_bytes(b"\x28\xb5\x2f\xfd\x04")
    with pytest.raises(UserError, match=r"cut.txt.gz|late.jsonl.gz|secret.txt.zst|t.parquet"):
        prepare(tmp_path / "out", [folder], val_fraction=0.0)
    manifest = prepare(tmp_path / "out", [folder], val_fraction=0.0, on_error="skip")
    assert manifest.sources[0].skipped_records == 4
    assert "text of a.txt" in decode_documents(tmp_path / "out", "train")
    assert "texts: left out 4 bad records" in caplog.messages
    assert any(message.startswith("texts: first bad record: ") for message in caplog.messages)


@pytest.mark.parametrize("name", ["b.txt", "b.jsonl", "b.npy"])
def test_file_that_the_system_cannot_read_for_a_while_is_not_skipped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    folder = write_texts(tmp_path / "texts", "a.txt")
    if name == "b.npy":
        np.save(folder / name, np.array([104, 105], np.uint16))
    else:
        (folder / name).write_text('{"text": "b"}')
    broken = folder / name

    def fail_on(path: Path, *rest: object) -> None:
        raise OSError(errno.ESTALE, "Stale file handle", str(path))

    def start(pool: WorkerPool, *rest: Any) -> None:
        for owner, function in ((formats, "open_bytes"), (token_files, "_read_head")):
            original = getattr(owner, function)
            monkeypatch.setattr(
                owner, function, lambda path, read=original: fail_on(path) if path == broken else read(path)
            )
        original_run(pool, *rest)

    original_run = WorkerPool.run
    monkeypatch.setattr(WorkerPool, "run", start)
    with pytest.raises(UserError, match=rf"{name}: cannot be read: Stale file handle; run the same command again"):
        prepare(tmp_path / "out", [folder], on_error="skip")
    assert not (tmp_path / "out").exists()


def test_files_are_cut_into_parts_in_linear_time(monkeypatch: pytest.MonkeyPatch) -> None:
    n_reads = 0

    class CountingFile(File):
        def __getattribute__(self, name: str) -> object:
            nonlocal n_reads
            n_reads += name == "size"
            return super().__getattribute__(name)

    monkeypatch.setattr(parts, "is_compressed", lambda path: False)
    files = [CountingFile(f"{index:06d}", Path("none"), "text", 8) for index in range(2000)]
    cut = parts.cut_into_parts(files, Records("text", skip_bad=False), val_fraction=0.1, role=None, tokenizer=None)
    assert sum(part.size for part in cut) == 16_000
    assert n_reads < 20 * len(files)


@pytest.mark.parametrize("error", [ValueError("an odd\nvalue"), RuntimeError("x" * 5000), ImportError("Pillow")])
def test_unknown_exception_of_a_worker_is_one_line_with_the_place(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    write_texts(tmp_path, "a.txt")

    def fail(*_: object) -> None:
        raise error

    monkeypatch.setattr(PartWorker, "_write_shards", fail)
    with pytest.raises(UserError, match=rf"a.txt: cannot be prepared: {type(error).__name__}: ") as caught:
        prepare(tmp_path / "out", [tmp_path / "a.txt"])
    assert len(str(caught.value)) < 300
    assert "\n" not in str(caught.value)
