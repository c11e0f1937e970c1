from pathlib import Path

import pytest

from gpt.checkpoint.run_folder import RunFolder, find_run, locate_checkpoint
from gpt.errors import UserError


def test_an_uncommitted_folder_is_no_checkpoint(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    for name in (".step_00000003.tmp", ".step_00000002.gone", "step_1", "step_00000001"):
        (folder.checkpoints / name).mkdir(parents=True)
        (folder.checkpoints / name / "manifest.json").touch()
    (folder.checkpoints / "step_00000009").mkdir()
    assert folder.list_checkpoints() == [folder.checkpoint_path(1)]


def test_a_folder_without_checkpoints_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=f"--resume {tmp_path}: holds no checkpoint"):
        locate_checkpoint(tmp_path, "--resume")
    with pytest.raises(UserError, match="no such folder"):
        locate_checkpoint(tmp_path / "none", "--resume")


def test_find_run_returns_the_run_of_a_checkpoint(finished_run: Path) -> None:
    assert find_run(RunFolder(finished_run).checkpoint_path(4)).path == finished_run.resolve()


def test_find_run_goes_up_from_the_link_to_another_disk(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path / "run")
    folder.path.mkdir()
    folder.config.touch()
    (tmp_path / "disk" / "step_00000001").mkdir(parents=True)
    folder.checkpoints.symlink_to(tmp_path / "disk")
    (tmp_path / "link").symlink_to("run")
    assert find_run(folder.checkpoint_path(1)).path == folder.path
    assert find_run(tmp_path / "link" / ".." / "run" / "checkpoints" / "step_00000001").path == folder.path
    assert find_run(RunFolder(tmp_path / "link").checkpoint_path(1)).config.samefile(folder.config)
