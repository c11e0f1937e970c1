import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from gpt.checkpoint import manifest
from gpt.commands.verify import run
from gpt.errors import UserError
from tests.conftest import read_files


@pytest.fixture
def run_dir(finished_run: Path, tmp_path: Path) -> Path:
    shutil.copytree(finished_run, tmp_path / "run")
    return tmp_path / "run"


def test_valid_run_is_shown_in_a_table_and_not_modified(run_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = read_files(run_dir)
    assert run([str(run_dir)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split() == ["checkpoint", "size", "val/loss", "state"]
    assert [line.split()[0] for line in lines[1:3]] == ["step_00000004", "step_00000008"]
    assert all(line.split()[-1] == "ok" and 1 < float(line.split()[-2]) < 7 for line in lines[1:3])
    assert all(line == line.rstrip() for line in lines)
    assert lines[3] == "2 checkpoints: 2 ok, 0 damaged, 0 unfinished"
    assert read_files(run_dir) == before


def test_damaged_checkpoint_is_named_with_both_digests(run_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    weights = run_dir / "checkpoints/step_00000004/model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    (run_dir / "checkpoints/step_00000008/manifest.json").unlink()
    (run_dir / "checkpoints/.step_00000012.tmp").mkdir()
    (run_dir / "checkpoints/notes.txt").touch()
    assert run([str(run_dir)]) == 1
    shown = capsys.readouterr().out
    assert "model.safetensors: damaged: SHA-256" in shown
    assert "step_00000008: " in shown
    assert "manifest.json: missing from the checkpoint" in shown
    assert shown.splitlines()[-1] == "3 checkpoints: 0 ok, 2 damaged, 1 unfinished"


def test_json_equals_the_plain_output(run_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (run_dir / "checkpoints/step_00000004/manifest.json").unlink()
    (run_dir / "checkpoints/.step_00000012.tmp").mkdir()
    assert run([str(run_dir)]) == 1
    lines = capsys.readouterr().out.splitlines()
    assert run([str(run_dir), "--json"]) == 1
    result = json.loads(capsys.readouterr().out)
    assert (result["ok"], result["damaged"], result["unfinished"]) == (1, 1, 1)
    assert lines[-1] == "3 checkpoints: 1 ok, 1 damaged, 1 unfinished"
    for line, checkpoint in zip(lines[1:4], result["checkpoints"], strict=True):
        assert (line.split()[0], line.split()[-1]) == (checkpoint["name"], checkpoint["state"])
    valid = next(checkpoint for checkpoint in result["checkpoints"] if checkpoint["state"] == "ok")
    assert f"{valid['val_loss']:.4f}" in lines[2]
    size = sum(path.stat().st_size for path in (run_dir / "checkpoints/step_00000008").iterdir())
    assert valid["size_bytes"] == size
    reasons = [f"{item['name']}: {item['reason']}" for item in result["checkpoints"] if item["reason"]]
    assert lines[4:-1] == reasons


@pytest.mark.parametrize("removed", ["step_00000004", ".step_00000012.tmp"])
def test_checkpoint_that_its_run_removes_meanwhile_is_not_damaged(
    run_dir: Path, removed: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoints = run_dir / "checkpoints"
    shutil.copytree(checkpoints / "step_00000008", checkpoints / ".step_00000012.tmp")
    list_files = Path.iterdir

    def list_then_remove(path: Path) -> Iterator[Path]:
        for count, file in enumerate(list_files(path)):
            if count == 0 and path.name == removed:
                shutil.rmtree(path)
            yield file

    monkeypatch.setattr(Path, "iterdir", list_then_remove)
    assert run([str(run_dir)]) == 0
    shown = capsys.readouterr().out
    assert removed not in shown
    assert shown.splitlines()[-1].startswith("2 checkpoints: ")


def test_checkpoint_removed_while_it_is_hashed_is_not_damaged(
    run_dir: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    verify = manifest.verify

    def remove_then_verify(path: Path) -> manifest.CheckpointManifest:
        if path.name == "step_00000004":
            shutil.rmtree(path)
        return verify(path)

    monkeypatch.setattr(manifest, "verify", remove_then_verify)
    assert run([str(run_dir)]) == 0
    assert capsys.readouterr().out.splitlines()[-1] == "1 checkpoint: 1 ok, 0 damaged, 0 unfinished"


def test_unfinished_checkpoint_is_not_damaged(run_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (run_dir / "checkpoints/.step_00000002.gone").mkdir()
    assert run([str(run_dir)]) == 0
    assert "unfinished" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("make", "message"),
    [(False, "RUN_DIR .*/none: no such folder; name the --run-dir"), (True, "not a run: it has no config.json")],
)
def test_folder_that_is_not_a_run_is_rejected(tmp_path: Path, make: bool, message: str) -> None:
    if make:
        (tmp_path / "none").mkdir()
    with pytest.raises(UserError, match=message):
        run([str(tmp_path / "none")])
