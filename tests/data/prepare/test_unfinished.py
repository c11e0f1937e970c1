import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from gpt.configs.data_config import PreparationConfig
from gpt.data.prepare import part_worker, parts, preparation
from gpt.data.prepare.parts import Part
from gpt.data.prepare.preparation import prepare_folder
from gpt.data.prepare.preparation_plan import plan_preparation
from gpt.data.prepare.unfinished import PartRecord, UnfinishedFolder
from gpt.data.shards import ShardWriter
from gpt.errors import UserError
from tests.conftest import limit_file_size, read_files
from tests.data.prepare.prepared import decode_documents, prepare


@pytest.mark.usefixtures("small_parts")
@pytest.mark.parametrize(
    ("workers", "limit", "deduplicate"),
    [(1, 100, False), (1, 3000, False), (1, 200, True), (1, 12_000, True), (2, 12_000, False)],
)
def test_full_disk_is_reported_in_one_line_and_the_same_command_resumes(
    tmp_path: Path, sources: list[Path], workers: int, limit: int, deduplicate: bool
) -> None:
    settings = {"workers": workers, "deduplicate": deduplicate, "on_error": "skip"}
    with (
        limit_file_size(limit),
        pytest.raises(UserError, match=r"^--out .*out: cannot be written: File too large; run the same command again"),
    ):
        prepare(tmp_path / "out", sources, **settings)
    assert [path.name for path in tmp_path.iterdir() if path.is_dir()] == [".out.unfinished"]
    prepare(tmp_path / "out", sources, **settings)
    prepare(tmp_path / "whole", sources, **{**settings, "workers": 1})
    assert read_files(tmp_path / "out") == read_files(tmp_path / "whole")


def stop_after(monkeypatch: pytest.MonkeyPatch, n_parts: int) -> None:
    """End the next preparation in this process when so many parts are done."""
    done = []
    work = part_worker.PartWorker.do

    def do(self: part_worker.PartWorker, action: part_worker.Action, *task: Any) -> None:
        if len(done) == n_parts:
            monkeypatch.setattr(part_worker.PartWorker, "do", work)
            raise KeyboardInterrupt
        work(self, action, *task)
        done.append(action == "shards")

    monkeypatch.setattr(part_worker.PartWorker, "do", do)


@pytest.mark.usefixtures("small_parts")
def test_unfinished_folder_of_another_preparation_is_refused(
    tmp_path: Path, sources: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    stop_after(monkeypatch, 3)
    with pytest.raises(KeyboardInterrupt):
        prepare(tmp_path / "out", sources, on_error="skip")
    with pytest.raises(
        UserError, match=r"\.out\.unfinished holds an unfinished preparation of other sources or settings"
    ):
        prepare(tmp_path / "out", sources, on_error="skip", val_fraction=0.2)
    with pytest.raises(UserError, match=r"unfinished preparation of other"):
        prepare(tmp_path / "out", sources[:1], on_error="skip")
    assert not (tmp_path / "out").exists()
    prepare(tmp_path / "out", sources, on_error="skip", workers=2)
    prepare(tmp_path / "whole", sources, on_error="skip")
    assert read_files(tmp_path / "out") == read_files(tmp_path / "whole")


@pytest.mark.parametrize("has_identity", [True, False])
def test_kill_before_the_final_rename_is_resumed(
    tmp_path: Path, sources: list[Path], monkeypatch: pytest.MonkeyPatch, has_identity: bool
) -> None:
    """Killed between the manifest and the rename."""
    config = PreparationConfig(tokenizer="byte", workers=1)
    plan = plan_preparation([str(sources[3])], config)

    def killed(path: Path, *_: object, **__: object) -> None:
        if path.exists():
            raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(*((preparation.shutil, "rmtree") if has_identity else (Path, "rename")), killed)
        prepare_folder(tmp_path / "out", plan, "--out")
    unfinished = tmp_path / ".out.unfinished"
    assert (unfinished / "corpus.json").exists()
    assert (unfinished / "preparation.json").exists() == has_identity
    if has_identity:
        with pytest.raises(UserError, match="unfinished preparation of other"):
            prepare(tmp_path / "out", sources[:1])
        prepare_folder(tmp_path / "out", plan, "--out")
    else:
        prepare(tmp_path / "out", sources[:1])
    prepare(tmp_path / "whole", [sources[3]] if has_identity else sources[:1])
    assert read_files(tmp_path / "out") == read_files(tmp_path / "whole")


@pytest.mark.usefixtures("small_parts")
def test_broken_stream_keeps_finished_parts(
    tmp_path: Path, sources: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "hub"
    folder.mkdir()
    for index in range(3):
        (folder / f"train-{index:05d}-of-00003.jsonl").write_text(json.dumps({"text": f"text {index}"}) + "\n")
    read = parts.read_stream

    def broken(address: str, records: Any, shard: int, n_shards: int) -> Iterator[Any]:
        if shard == 2:
            raise UserError("the network is gone")
        yield from read(address, records, shard, n_shards)

    with monkeypatch.context() as patch, pytest.raises(UserError, match="the network is gone"):
        patch.setattr(parts, "read_stream", broken)
        prepare(tmp_path / "out", [f"hf:{folder}"], val_fraction=0.0)
    shards = {path.name: path.stat().st_ino for path in (tmp_path / ".out.unfinished").glob("*.safetensors")}
    assert len(shards) == 2
    prepare(tmp_path / "out", [f"hf:{folder}"], val_fraction=0.0)
    assert {name: (tmp_path / "out" / name).stat().st_ino for name in shards} == shards
    assert decode_documents(tmp_path / "out", "train") == ["text 0", "text 1", "text 2"]


def test_part_is_done_when_its_record_and_shards_are_there(tmp_path: Path) -> None:
    folder, part = UnfinishedFolder(tmp_path / "out"), Part("text", (("a", "a.txt"),), 1, number=3)
    folder.claim({"sources": 1})
    assert not folder.is_done(part)
    with ShardWriter(folder.shard_path(part, "train"), 300) as writer:
        writer.add(np.arange(10), 10)
        shard = writer.finish()
    folder.write_record(part, PartRecord(train=shard, val=None, skipped_records=0, duplicates=0))
    assert folder.is_done(part)
    folder.claim({"sources": 1})
    assert folder.is_done(part)
    with pytest.raises(UserError, match="unfinished preparation of other sources"):
        folder.claim({"sources": 2})
    path = folder.shard_path(part, "train")
    path.write_bytes(path.read_bytes()[:-1])
    assert not folder.is_done(part)
