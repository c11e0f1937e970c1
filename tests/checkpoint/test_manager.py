import logging
from pathlib import Path

import pytest
import torch

from gpt.checkpoint import manager as manager_module
from gpt.checkpoint.app_state import AppState, Progress
from gpt.checkpoint.manager import CheckpointManager
from gpt.checkpoint.manifest import read_checkpoint_manifest, verify
from gpt.checkpoint.run_folder import RunFolder
from gpt.configs.checkpoint_config import CheckpointConfig
from gpt.errors import UserError
from gpt.utils.distributed import DistContext
from tests.checkpoint.test_store import make_state, trained_state
from tests.conftest import limit_file_size

WAYS = pytest.mark.parametrize("asynchronous", [False, True])


def make_manager(path: Path, *, resumed_at: int = 0, **config: object) -> CheckpointManager:
    settings = CheckpointConfig.model_validate({"keep": 0} | config)
    return CheckpointManager(RunFolder(path), settings, "{}", DistContext("cpu"), resumed_at)


def save(manager: CheckpointManager, state: AppState, step: int, loss: float | None = None) -> None:
    """Commit the state as `step`'s, and wait for it."""
    state.progress = Progress(step, step)
    manager.save(state, {} if loss is None else {"val/loss": loss})
    manager.finish()


def steps(path: Path) -> list[int]:
    return [int(found.name.removeprefix("step_")) for found in RunFolder(path).list_checkpoints()]


def flip(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)


@WAYS
@pytest.mark.parametrize(("keep", "left"), [(0, [1, 2, 3, 4]), (1, [4]), (3, [2, 3, 4])])
def test_the_newest_are_kept(tmp_path: Path, keep: int, left: list[int], asynchronous: bool) -> None:
    manager, state = make_manager(tmp_path, keep=keep, asynchronous=asynchronous), trained_state()
    for step in range(1, 5):
        save(manager, state, step)
    assert steps(tmp_path) == left
    assert len(list((tmp_path / "checkpoints").iterdir())) == len(left)


def test_a_synchronous_save_is_told_at_once(tmp_path: Path) -> None:
    manager, state = make_manager(tmp_path, asynchronous=False), trained_state()
    manager.save(state)
    assert manager.poll() == [(2, RunFolder(tmp_path).checkpoint_path(2))]
    assert manager.poll() == []


def test_an_asynchronous_save_is_told_when_it_is_there(tmp_path: Path) -> None:
    manager, state = make_manager(tmp_path), trained_state()
    manager.save(state)
    told: list[tuple[int, Path]] = []
    while not told:
        told = manager.poll()
        assert not told or steps(tmp_path) == [2]
    assert told == [(2, RunFolder(tmp_path).checkpoint_path(2))]
    assert manager.finish() == []


def test_what_is_saved_is_the_state_of_the_call_whatever_happens_to_it_then(tmp_path: Path) -> None:
    manager, state, loaded = make_manager(tmp_path), trained_state(), make_state(9)
    for step in (2, 3):  # into new buffers, and into old ones
        state.progress = Progress(step, 0)
        state.model.get_parameter("wte.weight").data.fill_(step)
        manager.save(state)
        state.model.get_parameter("wte.weight").data.fill_(-1)
    assert [step for step, _ in manager.finish()] == [2, 3]
    for step in (3, 2):
        manager.load_newest(loaded, at_most=step)
        assert bool((loaded.model.get_parameter("wte.weight") == step).all())
        assert loaded.progress.step == step


@WAYS
def test_a_full_disk_is_one_line_and_leaves_what_was_there(tmp_path: Path, asynchronous: bool) -> None:
    manager, state = make_manager(tmp_path, asynchronous=asynchronous), trained_state()
    save(manager, state, 2)
    told = r"step_00000003.tmp/model.safetensors: the checkpoint of step 3 cannot be saved: File too large; .*ulimit"
    with limit_file_size(2000), pytest.raises(UserError, match=told):
        save(manager, state, 3)
    assert steps(tmp_path) == [2]
    assert len(list((tmp_path / "checkpoints").iterdir())) == 1
    verify(RunFolder(tmp_path).checkpoint_path(2))
    save(manager, state, 4)
    assert steps(tmp_path) == [2, 4]


def test_a_failed_writer_is_told_by_the_next_poll_but_one(tmp_path: Path) -> None:
    manager, state = make_manager(tmp_path), trained_state()
    with limit_file_size(2000):
        manager.save(state)
        assert manager._writer is not None
        manager._writer.join()
        assert manager.poll() == []
        with pytest.raises(UserError, match="File too large"):
            manager.poll()
    assert manager.poll() == []


def test_the_next_save_waits_for_the_former_and_tells_of_its_failure(tmp_path: Path) -> None:
    manager, state = make_manager(tmp_path), trained_state()
    with limit_file_size(2000):
        manager.save(state)
        with pytest.raises(UserError, match="File too large"):
            manager.save(state)


def test_too_little_space_is_told_before_anything_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(manager_module, "NON_TENSOR_BYTES", 10**18)
    manager, state = make_manager(tmp_path, asynchronous=False), trained_state()
    told = (
        r"^the checkpoint of step 2 needs 1e\+06TB, .*B free on .*/checkpoints; lower --checkpoint.keep or free space"
    )
    with pytest.raises(UserError, match=told):
        manager.save(state)
    assert steps(tmp_path) == []


def test_what_pruning_would_remove_makes_room_but_for_the_newest(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    state = trained_state()
    manager = make_manager(tmp_path, asynchronous=False)
    for step in (1, 2, 3):
        save(manager, state, step)
    manager = make_manager(tmp_path, asynchronous=False, keep=1, resumed_at=3)
    monkeypatch.setattr(manager_module, "NON_TENSOR_BYTES", 10**18)
    with pytest.raises(UserError, match="needs"):
        save(manager, state, 4)
    assert steps(tmp_path) == [3]


@WAYS
def test_a_committed_step_is_never_rewritten(tmp_path: Path, asynchronous: bool) -> None:
    manager, state = make_manager(tmp_path, asynchronous=asynchronous), trained_state()
    save(manager, state, 2)
    path = RunFolder(tmp_path).checkpoint_path(2)
    before = {file.name: (file.stat().st_ino, file.read_bytes()) for file in path.iterdir()}
    state.model.get_parameter("wte.weight").data.zero_()
    save(manager, state, 2)
    assert {file.name: (file.stat().st_ino, file.read_bytes()) for file in path.iterdir()} == before


def test_a_damaged_step_is_written_anew_when_it_is_reached_again(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    state = trained_state()
    save(make_manager(tmp_path), state, 2)
    flip(RunFolder(tmp_path).checkpoint_path(2) / "model.safetensors")
    with caplog.at_level(logging.WARNING):
        save(make_manager(tmp_path), state, 2)
    verify(RunFolder(tmp_path).checkpoint_path(2))
    assert "damaged" in caplog.text


def test_checkpoints_that_the_run_did_not_continue_from_do_not_count(tmp_path: Path) -> None:
    """Of 2, 4 and 6 the last is damaged, so that the run goes on from 4: that one and 5 are the newest two."""
    state = trained_state()
    for step in (2, 4, 6):
        save(make_manager(tmp_path), state, step)
    manager = make_manager(tmp_path, keep=2, resumed_at=4)
    save(manager, state, 5)
    assert steps(tmp_path) == [4, 5, 6]
    save(manager, state, 7)
    assert steps(tmp_path) == [5, 7]


def test_the_best_is_kept_and_known_again_after_a_resume(tmp_path: Path) -> None:
    state = trained_state()
    manager = make_manager(tmp_path, keep=1, keep_best=True)
    assert manager.improves(9.0)
    for step, loss in ((1, 3.0), (2, 2.0), (3, 2.5), (4, None)):
        save(manager, state, step, loss)
    assert steps(tmp_path) == [2, 4]
    again = make_manager(tmp_path, keep=1, keep_best=True, resumed_at=4)
    assert (again.improves(2.1), again.improves(1.9), again.improves(float("nan"))) == (False, True, False)
    save(again, state, 5, 2.2)
    assert steps(tmp_path) == [2, 5]
    assert read_checkpoint_manifest(RunFolder(tmp_path).checkpoint_path(2)).metrics == {"val/loss": 2.0}


def test_a_damaged_best_does_not_stop_a_run(tmp_path: Path) -> None:
    state = trained_state()
    save(make_manager(tmp_path), state, 1, 2.0)
    (RunFolder(tmp_path).checkpoint_path(1) / "manifest.json").write_text("[" * 10_000)
    manager = make_manager(tmp_path, keep_best=True, resumed_at=1)
    assert manager.improves(3.0)


def test_falling_back_takes_the_newest_that_verifies_and_gives_up_what_is_later(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    manager, state = make_manager(tmp_path, keep_best=True), trained_state()
    for step in (1, 2, 3, 4):
        state.model.get_parameter("wte.weight").data.fill_(step)
        save(manager, state, step, loss=10.0 - step)
    flip(RunFolder(tmp_path).checkpoint_path(3) / "optimizer.safetensors")
    loaded = make_state(9)
    with caplog.at_level(logging.WARNING):
        assert manager.load_newest(loaded, at_most=3) == RunFolder(tmp_path).checkpoint_path(2)
    assert "step_00000003/optimizer.safetensors: damaged: SHA-256" in caplog.text
    assert loaded.progress.step == 2
    assert torch.equal(loaded.model.get_parameter("wte.weight"), torch.full((11, 8), 2.0))
    assert steps(tmp_path) == [1, 2]
    assert manager.improves(7.0)  # 6.0 was of the step that is given up
    assert manager.load_newest(loaded, at_most=0) is None
    assert loaded.progress.step == 2
    save(manager, state, 3)
    assert steps(tmp_path) == [1, 2, 3]


def test_a_clean_end_and_an_error_wait_for_the_writer(tmp_path: Path) -> None:
    for step, error in ((1, None), (2, RuntimeError())):
        manager, state = make_manager(tmp_path), trained_state()
        state.progress = Progress(step, step)
        manager.save(state)
        manager.close(error)
        verify(RunFolder(tmp_path).checkpoint_path(step))
