import errno
import fcntl
import os
import stat
import sys
from pathlib import Path

import pytest

from gpt.errors import UserError
from gpt.utils import atomic_io
from gpt.utils.atomic_io import (
    append_jsonl,
    commit_folder,
    filter_jsonl,
    read_json,
    read_jsonl,
    remove_folder,
    remove_leftovers,
    require_writable,
    write_json,
)


def test_a_failed_commit_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError), commit_folder(tmp_path / "made") as folder:
        (folder / "half").write_text("x")
        raise RuntimeError
    assert list(tmp_path.iterdir()) == []


def test_a_folder_is_complete_when_it_gets_its_name(tmp_path: Path) -> None:
    with commit_folder(tmp_path / "made") as folder:
        (folder / "file").write_text("x")
        assert not (tmp_path / "made").exists()
    assert [path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*")] == ["made", "made/file"]


def test_leftovers_of_a_killed_process_do_not_get_into_a_folder(tmp_path: Path) -> None:
    (tmp_path / ".made.tmp").mkdir()
    (tmp_path / ".made.tmp" / "stale").touch()
    with commit_folder(tmp_path / "made") as folder:
        (folder / "file").touch()
    assert [path.name for path in (tmp_path / "made").iterdir()] == ["file"]


def test_remove_folder_leaves_nothing(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "file").touch()
    remove_folder(tmp_path / "a")
    assert list(tmp_path.iterdir()) == []


def test_leftovers_are_removed_and_other_folders_stay(tmp_path: Path) -> None:
    for name in (".a.tmp", ".b.gone", "c", ".d"):
        (tmp_path / name / "sub").mkdir(parents=True)
    remove_leftovers(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == [".d", "c"]


def test_a_failed_write_keeps_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    write_json(path, {"a": 1})
    with pytest.raises(TypeError):
        write_json(path, {"a": object()})
    assert path.read_text() == '{\n  "a": 1\n}\n'


def test_filter_jsonl_drops_unwanted_records_and_a_torn_last_line(tmp_path: Path) -> None:
    path = tmp_path / "m.jsonl"
    for step in range(5):
        append_jsonl(path, {"step": step})
    with path.open("a") as file:
        file.write('{"step": 1, "text": "a\u2028b\x85c"}\n5\n' + "[" * 100_000 + '\n{"step": 1, "los')
    filter_jsonl(path, lambda record: record["step"] <= 2)
    lines = path.read_text(encoding="utf-8").split("\n")
    assert lines == ['{"step": 0}', '{"step": 1}', '{"step": 2}', '{"step": 1, "text": "a\u2028b\x85c"}', ""]


def test_folder_that_another_process_makes_at_the_same_time_is_no_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make = Path.mkdir

    def make_second(path: Path, **settings: bool) -> None:
        os.mkdir(path)  # noqa: PTH102 - the other process
        make(path, **settings)

    monkeypatch.setattr(Path, "mkdir", make_second)
    require_writable(tmp_path / "runs" / "a", "--run-dir")
    assert (tmp_path / "runs" / "a").is_dir()


def test_an_unwritable_folder_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=r"--run-dir .*file/sub: cannot write there: Not a directory"):
        require_writable(tmp_path / "file" / "sub", "--run-dir")


@pytest.mark.parametrize("durable", [False, True])
def test_append_jsonl_adds_a_line_to_a_file(tmp_path: Path, durable: bool) -> None:
    path = tmp_path / "m.jsonl"
    records = [{"step": 1, "text": "é\n\u2028"}, {"step": 2}]
    for record in records:
        append_jsonl(path, record, durable=durable)
    assert list(read_jsonl(path)) == records
    assert path.read_bytes().count(b"\n") == 2


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads Linux's /proc")
def test_a_durable_line_is_on_the_disk_before_append_returns(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    synced: list[tuple[str, bytes]] = []
    path = tmp_path / "m.jsonl"
    fsync = os.fsync

    def record(descriptor: int) -> None:
        synced.append((str(Path(f"/proc/self/fd/{descriptor}").readlink()), path.read_bytes()))
        fsync(descriptor)

    monkeypatch.setattr(atomic_io.os, "fsync", record)
    append_jsonl(path, {"step": 1})
    assert synced == []
    append_jsonl(path, {"step": 2}, durable=True)
    content = b'{"step": 1}\n{"step": 2}\n'
    assert synced == [(str(path), content), (str(tmp_path), content)]


@pytest.mark.parametrize(
    ("content", "message"), [("{", "not valid JSON"), ("[1]", "not a JSON object"), ("[" * 100_000, "not valid JSON")]
)
def test_read_json_names_a_file_that_holds_no_object(tmp_path: Path, content: str, message: str) -> None:
    path = tmp_path / "a.json"
    with pytest.raises(UserError, match=f"{path}: No such file"):
        read_json(path)
    path.write_text(content)
    with pytest.raises(UserError, match=f"{path}: {message}"):
        read_json(path)
    write_json(path, {"a": 1})
    assert read_json(path) == {"a": 1}


def test_files_are_flushed_as_windows_needs_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Refuse to flush a descriptor that is open for reading only, and to open a folder, as Windows does."""
    flushed = []

    def flush(descriptor: int) -> None:
        if fcntl.fcntl(descriptor, fcntl.F_GETFL) & os.O_ACCMODE == os.O_RDONLY:
            raise OSError(errno.EBADF, os.strerror(errno.EBADF))
        assert not stat.S_ISDIR(os.fstat(descriptor).st_mode)
        flushed.append(descriptor)

    monkeypatch.setattr(atomic_io.os, "fsync", flush)
    monkeypatch.setattr(atomic_io.os, "name", "nt")
    write_json(tmp_path / "file", {"a": "\n"})
    append_jsonl(tmp_path / "lines", {"a": 1}, durable=True)
    with commit_folder(tmp_path / "made") as folder:
        (folder / "file").touch()
    monkeypatch.undo()
    assert len(flushed) == 3
    assert read_json(tmp_path / "file") == {"a": "\n"}
    assert b"\r" not in (tmp_path / "file").read_bytes()
