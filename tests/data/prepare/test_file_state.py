import os
from collections.abc import Callable
from pathlib import Path

import pytest

from gpt.data.prepare import file_state, part_worker
from gpt.data.prepare.file_state import SourceChangedError, read_file_state, require_unchanged
from gpt.data.prepare.parts import Part
from gpt.data.prepare.workers import WorkerPool
from gpt.utils.helper import sha256_of_file
from tests.data.prepare.prepared import decode_documents, prepare


def rewrite(path: Path) -> None:
    path.write_bytes(b"b" * path.stat().st_size)


def rewrite_with_the_former_time(path: Path) -> None:
    status = path.stat()
    rewrite(path)
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))


def truncate(path: Path) -> None:
    os.truncate(path, 3)


def replace(path: Path) -> None:
    other = path.with_name(".other")
    other.write_bytes(b"c" * path.stat().st_size)
    os.utime(other, ns=(path.stat().st_atime_ns, path.stat().st_mtime_ns))
    other.replace(path)


CHANGES = [rewrite, rewrite_with_the_former_time, truncate, replace, Path.unlink]


@pytest.mark.parametrize("change", CHANGES)
def test_change_of_a_file_is_reported(tmp_path: Path, change: Callable[[Path], None]) -> None:
    path = tmp_path / "a.txt"
    path.write_bytes(b"a" * 1000)
    os.utime(path, (1, 1))
    state = read_file_state(path)
    require_unchanged([state])
    change(path)
    with pytest.raises(SourceChangedError, match=r"a.txt: changed while it was prepared: .*; run the same"):
        require_unchanged([state])


def test_another_link_to_a_file_is_no_change(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a.txt"
    path.write_text("a")
    state = read_file_state(path)
    os.link(path, tmp_path / "b.txt")
    assert path.stat().st_ctime_ns != state.ctime_ns
    compared: list[Path] = []

    def digest(path: Path) -> str:
        compared.append(path)
        return sha256_of_file(path)

    monkeypatch.setattr(file_state, "sha256_of_file", digest)
    require_unchanged([state])
    assert compared == [path]  # the content was compared, and is the same


@pytest.mark.parametrize("change", [rewrite, truncate, Path.unlink])
@pytest.mark.parametrize("tokenizer", ["byte", "char"])
def test_source_that_changes_while_it_is_prepared_is_refused_and_nothing_stays(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, change: Callable[[Path], None], tokenizer: str
) -> None:
    path = tmp_path / "texts" / "a.txt"
    path.parent.mkdir()
    path.write_bytes(b"a" * 1000)
    (tmp_path / "texts" / "b.txt").write_text("another text")
    run = WorkerPool.run

    def run_and_change(pool: WorkerPool, action: part_worker.Action, parts: list[Part], advance: object) -> None:
        run(pool, action, parts, advance)  # type: ignore[arg-type]
        change(path)

    monkeypatch.setattr(WorkerPool, "run", run_and_change)
    with pytest.raises(SourceChangedError, match=r"a.txt: changed while it was prepared"):
        prepare(tmp_path / "out", [path.parent], tokenizer=tokenizer)
    assert [entry.name for entry in tmp_path.iterdir() if "out" in entry.name and "lock" not in entry.name] == []


def test_tokenizer_that_changes_while_it_is_used_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a.txt").write_text("a text " * 50)
    prepare(tmp_path / "first", [tmp_path / "a.txt"])
    tokenizer = tmp_path / "tokenizer.json"
    tokenizer.write_bytes((tmp_path / "first" / "tokenizer.json").read_bytes())
    run = WorkerPool.run

    def run_and_change(pool: WorkerPool, action: part_worker.Action, parts: list[Part], advance: object) -> None:
        run(pool, action, parts, advance)  # type: ignore[arg-type]
        tokenizer.write_text(tokenizer.read_text() + " ")

    monkeypatch.setattr(WorkerPool, "run", run_and_change)
    with pytest.raises(SourceChangedError, match=r"tokenizer.json: changed while it was used"):
        prepare(tmp_path / "out", [tmp_path / "a.txt"], tokenizer=str(tokenizer))


def test_parts_made_before_a_source_was_written_again_are_not_used(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Interrupt a preparation of changed bytes, restore the bytes, and prepare again."""
    path = tmp_path / "a.txt"
    path.write_bytes(b"a" * 1000)
    run = WorkerPool.run

    def run_on_other_bytes(pool: WorkerPool, action: part_worker.Action, parts: list[Part], advance: object) -> None:
        rewrite(path)
        run(pool, action, parts, advance)  # type: ignore[arg-type]
        raise KeyboardInterrupt

    monkeypatch.setattr(WorkerPool, "run", run_on_other_bytes)
    with pytest.raises(KeyboardInterrupt):
        prepare(tmp_path / "out", [path], val_fraction=0.0)
    path.write_bytes(b"a" * 1000)
    monkeypatch.setattr(WorkerPool, "run", run)
    prepare(tmp_path / "out", [path], val_fraction=0.0)
    assert decode_documents(tmp_path / "out", "train") == ["a" * 1000]
