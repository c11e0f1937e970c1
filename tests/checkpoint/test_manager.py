from pathlib import Path

import pytest

from gpt.checkpoint.app_state import Progress
from gpt.checkpoint.manager import CheckpointManager
from gpt.checkpoint.run_folder import RunFolder
from gpt.checkpoint.store import verify
from gpt.errors import UserError
from gpt.utils.distributed import DistContext
from tests.checkpoint.test_store import trained_state
from tests.conftest import small_files


@pytest.mark.parametrize(("keep", "left"), [(0, [1, 2, 3, 4]), (1, [4]), (3, [2, 3, 4])])
def test_the_newest_are_kept(tmp_path: Path, keep: int, left: list[int]) -> None:
    folder, state = RunFolder(tmp_path), trained_state()
    manager = CheckpointManager(folder, keep, "{}", DistContext("cpu"))
    for step in range(1, 5):
        state.progress = Progress(step, step)
        assert manager.save(state) == folder.checkpoint_at(step)
    assert folder.committed() == [folder.checkpoint_at(step) for step in left]
    assert len(list(folder.checkpoints.iterdir())) == len(left)


def test_a_full_disk_is_one_line_and_leaves_what_was_there(tmp_path: Path) -> None:
    folder, state = RunFolder(tmp_path), trained_state()
    manager = CheckpointManager(folder, 1, "{}", DistContext("cpu"))
    first = manager.save(state)
    state.progress = Progress(3, 3)
    with small_files(2000), pytest.raises(UserError, match=r"step_00000003: the checkpoint cannot be saved: .*large"):
        manager.save(state)
    assert list(folder.checkpoints.iterdir()) == [first]
    verify(first)


def test_a_committed_step_is_never_rewritten(tmp_path: Path) -> None:
    manager = CheckpointManager(RunFolder(tmp_path), 0, "{}", DistContext("cpu"))
    state = trained_state()
    path = manager.save(state)
    before = {file.name: (file.stat().st_ino, file.read_bytes()) for file in path.iterdir()}
    state.model.get_parameter("wte.weight").data.zero_()
    manager.save(state)
    assert {file.name: (file.stat().st_ino, file.read_bytes()) for file in path.iterdir()} == before


def test_the_newest_sound_checkpoint_up_to_a_step_is_loaded(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    folder, state = RunFolder(tmp_path), trained_state()
    manager = CheckpointManager(folder, 0, "{}", DistContext("cpu"))
    for step in (0, 9, 10, 11):
        state.progress = Progress(step, 2 * step)
        manager.save(state)
    manager.finish()
    assert manager.load_newest(state, at_most=10) == folder.checkpoint_at(10)
    assert state.progress == Progress(10, 20)
    file = folder.checkpoint_at(10) / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1] + b"?")
    assert manager.load_newest(state, at_most=10) == folder.checkpoint_at(9)
    assert f"{file}: damaged" in caplog.text
    assert folder.committed() == [folder.checkpoint_at(0), folder.checkpoint_at(9)]
    assert manager.load_newest(state, at_most=-1) is None
    assert len(folder.committed()) == 2
