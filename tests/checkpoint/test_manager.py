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

SYNC_AND_ASYNC = pytest.mark.parametrize("asynchronous", [False, True])


def make_manager(path: Path, *, resumed_at: int = 0, **config: object) -> CheckpointManager:
    settings = CheckpointConfig.model_validate({"keep": 0} | config)
    return CheckpointManager(RunFolder(path), settings, "{}", DistContext("cpu"), resumed_at)


def save(manager: CheckpointManager, state: AppState, step: int, loss: float | None = None) -> None:
    """Commit the state as the checkpoint of `step`, and wait for it."""
    state.progress = Progress(step, step)
    manager.save(state, {} if loss is None else {"val/loss": loss})
    manager.finish()


def steps(path: Path) -> list[int]:
    return [int(found.name.removeprefix("step_")) for found in RunFolder(path).list_checkpoints()]


def flip_last_bit(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)


@SYNC_AND_ASYNC
@pytest.mark.parametrize(("keep", "expected"), [(0, [1, 2, 3, 4]), (1, [4]), (3, [2, 3, 4])])
def test_newest_checkpoints_are_kept(tmp_path: Path, keep: int, expected: list[int], asynchronous: bool) -> None:
    manager, state = make_manager(tmp_path, keep=keep, asynchronous=asynchronous), trained_state()
    for step in range(1, 5):
        save(manager, state, step)
    assert steps(tmp_path) == expected
    assert len(list((tmp_path / "checkpoints").iterdir())) == len(expected)


def test_poll_returns_a_synchronous_save_at_once(tmp_path: Path) -> None:
    manager, state = make_manager(tmp_path, asynchronous=False), trained_state()
    manager.save(state)
    assert manager.poll() == [(2, RunFolder(tmp_path).checkpoint_path(2))]
    assert manager.poll() == []


def test_poll_returns_an_asynchronous_save_when_it_is_committed(tmp_path: Path) -> None:
    manager, state = make_manager(tmp_path), trained_state()
    manager.save(state)
    polled: list[tuple[int, Path]] = []
    while not polled:
        polled = manager.poll()
        assert not polled or steps(tmp_path) == [2]
    assert polled == [(2, RunFolder(tmp_path).checkpoint_path(2))]
    assert manager.finish() == []


def test_training_on_does_not_change_a_snapshot(tmp_path: Path) -> None:
    manager, state, loaded = make_manager(tmp_path), trained_state(), make_state(9)
    for step in (2, 3):  # into new buffers, and into reused ones
        state.progress = Progress(step, 0)
        state.model.get_parameter("wte.weight").data.fill_(step)
        manager.save(state)
        state.model.get_parameter("wte.weight").data.fill_(-1)
    assert [step for step, _ in manager.finish()] == [2, 3]
    for step in (3, 2):
        manager.load_newest(loaded, at_most=step)
        assert bool((loaded.model.get_parameter("wte.weight") == step).all())
        assert loaded.progress.step == step


@SYNC_AND_ASYNC
def test_a_refused_write_is_one_line_and_leaves_older_checkpoints_valid(tmp_path: Path, asynchronous: bool) -> None:
    manager, state = make_manager(tmp_path, asynchronous=asynchronous), trained_state()
    save(manager, state, 2)
    message = r"step_00000003.tmp/model.safetensors: the checkpoint of step 3 cannot be saved: File too large; .*ulimit"
    with limit_file_size(2000), pytest.raises(UserError, match=message):
        save(manager, state, 3)
    assert steps(tmp_path) == [2]
    assert len(list((tmp_path / "checkpoints").iterdir())) == 1
    verify(RunFolder(tmp_path).checkpoint_path(2))
    save(manager, state, 4)
    assert steps(tmp_path) == [2, 4]


def test_a_failed_writer_raises_at_the_second_poll(tmp_path: Path) -> None:
    manager, state = make_manager(tmp_path), trained_state()
    with limit_file_size(2000):
        manager.save(state)
        assert manager._writer is not None
        manager._writer.join()
        assert manager.poll() == []
        with pytest.raises(UserError, match="File too large"):
            manager.poll()
    assert manager.poll() == []


def test_the_next_save_raises_the_failure_of_the_previous_one(tmp_path: Path) -> None:
    manager, state = make_manager(tmp_path), trained_state()
    with limit_file_size(2000):
        manager.save(state)
        with pytest.raises(UserError, match="File too large"):
            manager.save(state)


def test_too_little_space_is_reported_before_anything_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(manager_module, "NON_TENSOR_BYTES", 10**18)
    manager, state = make_manager(tmp_path, asynchronous=False), trained_state()
    message = (
        r"^the checkpoint of step 2 needs 1 EB, but only .*B are free on .*/checkpoints; "
        r"lower --checkpoint.keep or free space"
    )
    with pytest.raises(UserError, match=message):
        manager.save(state)
    assert steps(tmp_path) == []


def test_prunable_checkpoints_make_room_except_the_newest(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    state = trained_state()
    manager = make_manager(tmp_path, asynchronous=False)
    for step in (1, 2, 3):
        save(manager, state, step)
    manager = make_manager(tmp_path, asynchronous=False, keep=1, resumed_at=3)
    monkeypatch.setattr(manager_module, "NON_TENSOR_BYTES", 10**18)
    with pytest.raises(UserError, match="needs"):
        save(manager, state, 4)
    assert steps(tmp_path) == [3]


@SYNC_AND_ASYNC
def test_a_committed_step_is_never_rewritten(tmp_path: Path, asynchronous: bool) -> None:
    manager, state = make_manager(tmp_path, asynchronous=asynchronous), trained_state()
    save(manager, state, 2)
    path = RunFolder(tmp_path).checkpoint_path(2)
    before = {file.name: (file.stat().st_ino, file.read_bytes()) for file in path.iterdir()}
    state.model.get_parameter("wte.weight").data.zero_()
    save(manager, state, 2)
    assert {file.name: (file.stat().st_ino, file.read_bytes()) for file in path.iterdir()} == before


def test_a_damaged_step_is_written_again_when_the_run_reaches_it(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    state = trained_state()
    save(make_manager(tmp_path), state, 2)
    flip_last_bit(RunFolder(tmp_path).checkpoint_path(2) / "model.safetensors")
    with caplog.at_level(logging.WARNING):
        save(make_manager(tmp_path), state, 2)
    verify(RunFolder(tmp_path).checkpoint_path(2))
    assert "damaged" in caplog.text


def test_checkpoints_past_the_resumed_step_do_not_count(tmp_path: Path) -> None:
    """Step 6 is damaged and the run resumes from 4, so 4 and 5 are the newest two."""
    state = trained_state()
    for step in (2, 4, 6):
        save(make_manager(tmp_path), state, step)
    manager = make_manager(tmp_path, keep=2, resumed_at=4)
    save(manager, state, 5)
    assert steps(tmp_path) == [4, 5, 6]
    save(manager, state, 7)
    assert steps(tmp_path) == [5, 7]


def test_the_best_checkpoint_is_kept_and_known_after_a_resume(tmp_path: Path) -> None:
    state = trained_state()
    manager = make_manager(tmp_path, keep=1, keep_best=True)
    assert manager.improves(9.0)
    for step, loss in ((1, 3.0), (2, 2.0), (3, 2.5), (4, None)):
        save(manager, state, step, loss)
    assert steps(tmp_path) == [2, 4]
    resumed = make_manager(tmp_path, keep=1, keep_best=True, resumed_at=4)
    assert (resumed.improves(2.1), resumed.improves(1.9), resumed.improves(float("nan"))) == (False, True, False)
    save(resumed, state, 5, 2.2)
    assert steps(tmp_path) == [2, 5]
    assert read_checkpoint_manifest(RunFolder(tmp_path).checkpoint_path(2)).metrics == {"val/loss": 2.0}


def test_a_damaged_best_checkpoint_does_not_end_a_run(tmp_path: Path) -> None:
    state = trained_state()
    save(make_manager(tmp_path), state, 1, 2.0)
    (RunFolder(tmp_path).checkpoint_path(1) / "manifest.json").write_text("[" * 10_000)
    manager = make_manager(tmp_path, keep_best=True, resumed_at=1)
    assert manager.improves(3.0)


def test_rollback_loads_the_newest_valid_checkpoint_and_removes_later_ones(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    manager, state = make_manager(tmp_path, keep_best=True), trained_state()
    for step in (1, 2, 3, 4):
        state.model.get_parameter("wte.weight").data.fill_(step)
        save(manager, state, step, loss=10.0 - step)
    flip_last_bit(RunFolder(tmp_path).checkpoint_path(3) / "optimizer.safetensors")
    loaded = make_state(9)
    with caplog.at_level(logging.WARNING):
        assert manager.load_newest(loaded, at_most=3) == RunFolder(tmp_path).checkpoint_path(2)
    assert "step_00000003/optimizer.safetensors: damaged: SHA-256" in caplog.text
    assert loaded.progress.step == 2
    assert torch.equal(loaded.model.get_parameter("wte.weight"), torch.full((11, 8), 2.0))
    assert steps(tmp_path) == [1, 2]
    assert manager.improves(7.0)  # 6.0 was the loss of step 4, which was removed
    assert manager.load_newest(loaded, at_most=0) is None
    assert loaded.progress.step == 2
    save(manager, state, 3)
    assert steps(tmp_path) == [1, 2, 3]


def test_close_waits_for_the_writer_with_and_without_an_error(tmp_path: Path) -> None:
    for step, error in ((1, None), (2, RuntimeError())):
        manager, state = make_manager(tmp_path), trained_state()
        state.progress = Progress(step, step)
        manager.save(state)
        manager.close(error)
        verify(RunFolder(tmp_path).checkpoint_path(step))
