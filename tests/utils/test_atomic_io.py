from pathlib import Path

import pytest

from gpt.errors import UserError
from gpt.utils.atomic_io import (
    append_jsonl,
    commit_folder,
    filter_jsonl,
    remove_folder,
    remove_leftovers,
    require_writable,
    write_json,
)


def test_a_folder_that_fails_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError), commit_folder(tmp_path / "made") as folder:
        (folder / "half").write_text("x")
        raise RuntimeError
    assert list(tmp_path.iterdir()) == []


def test_a_folder_appears_whole_under_its_name_alone(tmp_path: Path) -> None:
    with commit_folder(tmp_path / "made") as folder:
        (folder / "file").write_text("x")
        assert not (tmp_path / "made").exists()
    assert [path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*")] == ["made", "made/file"]


def test_what_an_earlier_death_left_does_not_get_into_a_folder(tmp_path: Path) -> None:
    (tmp_path / ".made.tmp").mkdir()
    (tmp_path / ".made.tmp" / "stale").touch()
    with commit_folder(tmp_path / "made") as folder:
        (folder / "file").touch()
    assert [path.name for path in (tmp_path / "made").iterdir()] == ["file"]


def test_remove_folder(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "file").touch()
    remove_folder(tmp_path / "a")
    assert list(tmp_path.iterdir()) == []


def test_what_a_killed_process_left_is_swept_away(tmp_path: Path) -> None:
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


def test_keep_jsonl_drops_the_unwanted_and_a_torn_last_line(tmp_path: Path) -> None:
    path = tmp_path / "m.jsonl"
    for step in range(5):
        append_jsonl(path, {"step": step})
    with path.open("a") as file:
        file.write('{"step": 1, "text": "a\u2028b\x85c"}\n5\n{"step": 1, "los')
    filter_jsonl(path, lambda record: record["step"] <= 2)
    kept = path.read_text(encoding="utf-8").split("\n")
    assert kept == ['{"step": 0}', '{"step": 1}', '{"step": 2}', '{"step": 1, "text": "a\u2028b\x85c"}', ""]


def test_an_unwritable_folder_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=r"--run-dir .*file/sub: cannot write there: Not a directory"):
        require_writable(tmp_path / "file" / "sub", "--run-dir")
