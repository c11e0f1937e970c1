import shutil
from pathlib import Path

import pytest

from gpt.commands.verify import run
from gpt.errors import UserError
from tests.conftest import read_files


@pytest.fixture
def run_dir(finished_run: Path, tmp_path: Path) -> Path:
    shutil.copytree(finished_run, tmp_path / "run")
    return tmp_path / "run"


def test_a_sound_run_is_told_in_a_table_and_left_as_it_is(run_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = read_files(run_dir)
    assert run([str(run_dir)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split() == ["checkpoint", "size", "val/loss", "state"]
    assert [line.split()[0] for line in lines[1:3]] == ["step_00000004", "step_00000008"]
    assert all(line.split()[-1] == "ok" and 1 < float(line.split()[2]) < 7 for line in lines[1:3])
    assert lines[3] == "2 checkpoints: 2 ok, 0 damaged, 0 unfinished"
    assert read_files(run_dir) == before


def test_what_is_damaged_is_named_with_both_digests(run_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
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


def test_what_is_unfinished_is_no_damage(run_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (run_dir / "checkpoints/.step_00000002.gone").mkdir()
    assert run([str(run_dir)]) == 0
    assert "unfinished" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("make", "message"),
    [(False, "RUN_DIR .*/none: no such folder; name the --run-dir"), (True, "is no run: it holds no config.json")],
)
def test_what_is_no_run_is_told(tmp_path: Path, make: bool, message: str) -> None:
    if make:
        (tmp_path / "none").mkdir()
    with pytest.raises(UserError, match=message):
        run([str(tmp_path / "none")])
