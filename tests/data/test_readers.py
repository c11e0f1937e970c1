import os
from pathlib import Path

import pytest

from gpt.data.formats import Document, Records
from gpt.data.readers import STDLIB, STDLIB_LEFT_OUT, fingerprint, read_source
from gpt.errors import UserError

RECORDS = Records("text", skip_bad=False)


def names(documents: list[Document]) -> list[str]:
    return [document.name for document in documents]


def test_stdlib_is_its_sources_without_tests_and_tables() -> None:
    documents = read_source(STDLIB, RECORDS)
    assert {"argparse.py", "json/decoder.py"} <= set(names(documents))
    assert not [name for name in names(documents) if STDLIB_LEFT_OUT.intersection(Path(name).parts)]
    assert all(name.endswith(".py") for name in names(documents))
    assert sum(document.n_bytes for document in documents) > 4_000_000


def test_a_folder_is_read_in_the_order_of_names(tmp_path: Path) -> None:
    for name in ("b.txt", "a.py", "sub/c.md", "sub/.hidden", ".git/config", "__pycache__/x.py", "empty.txt"):
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.write_text("" if name.startswith("empty") else name)
    (tmp_path / "picture.png").write_bytes(b"\x89PNG\0\0")
    assert names(read_source(str(tmp_path), RECORDS)) == ["a.py", "b.txt", "sub/c.md"]


def test_text_is_kept_to_the_byte(tmp_path: Path) -> None:
    path = tmp_path / "t.txt"
    content = "\ufeffa\r\nb\0é🙂\n".encode()
    path.write_bytes(content)
    assert [document.text.encode() for document in read_source(str(path), RECORDS)] == [content]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", r"--data.source .*t.txt: the file is empty"),
        (b"ok \xff\xfe", r"t.txt: not UTF-8 at byte offset 3 \(0xff\)"),
        (None, r"--data.source .*t.txt: no such file or folder"),
    ],
)
def test_a_bad_file_is_named(tmp_path: Path, content: bytes | None, message: str) -> None:
    path = tmp_path / "t.txt"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(UserError, match=message):
        read_source(str(path), RECORDS)


def test_a_bad_file_in_a_folder_is_named(tmp_path: Path) -> None:
    (tmp_path / "good.txt").write_text("good")
    (tmp_path / "bad.txt").write_bytes(b"\xe9t\xe9")
    with pytest.raises(UserError, match=r"bad.txt: not UTF-8 at byte offset 0"):
        read_source(str(tmp_path), RECORDS)


def test_pipes_and_broken_links_are_no_documents(tmp_path: Path) -> None:
    (tmp_path / "good.txt").write_text("good")
    (tmp_path / "link.txt").symlink_to(tmp_path / "none")
    os.mkfifo(tmp_path / "pipe.txt")
    assert names(read_source(str(tmp_path), RECORDS)) == ["good.txt"]
    with pytest.raises(UserError, match=r"pipe.txt: neither a file nor a folder"):
        read_source(str(tmp_path / "pipe.txt"), RECORDS)


def test_names_that_are_not_unicode_are_read(tmp_path: Path) -> None:
    Path(os.fsdecode(os.fsencode(tmp_path) + b"/caf\xe9.txt")).write_text("good")
    documents = read_source(str(tmp_path), RECORDS)
    assert len(fingerprint(documents)) == 64
    assert [document.text for document in documents] == ["good"]


def test_a_name_that_is_too_long_is_told() -> None:
    with pytest.raises(UserError, match="cannot be read: File name too long"):
        read_source("x" * 300, RECORDS)


def test_a_folder_without_text_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="the folder holds no text"):
        read_source(str(tmp_path), RECORDS)


def test_fingerprint_sees_names_texts_and_their_borders() -> None:
    variants = [
        [Document("a", "bc")],
        [Document("ab", "c")],
        [Document("a", "bd")],
        [Document("a", "b"), Document("", "c")],
    ]
    assert len({fingerprint(documents) for documents in variants}) == len(variants)
