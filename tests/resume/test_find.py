import errno
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from gpt.checkpoint import manifest
from gpt.checkpoint.manifest import CHECKPOINT_FORMAT_VERSION, read_checkpoint_manifest
from gpt.checkpoint.run_folder import RunFolder
from gpt.configs.train_config import TrainConfig
from gpt.errors import UserError
from gpt.resume.find import claim_start, find_start
from gpt.run import open_run
from gpt.utils.folder_lock import unlock_folder
from gpt.utils.helper import sha256_of_file

Configure = Callable[..., TrainConfig]


def found_checkpoint(folder: RunFolder, config: TrainConfig) -> Path | None:
    return find_start(folder, config, "cpu").checkpoint


def test_new_folder_starts_at_step_0(tiny: Configure, tmp_path: Path) -> None:
    assert found_checkpoint(RunFolder(tmp_path / "new"), tiny(tmp_path / "new")) is None


def test_auto_resumes_from_the_newest_checkpoint(tiny: Configure, finished_run: Path) -> None:
    folder = RunFolder(finished_run)
    assert [path.name for path in folder.list_checkpoints()] == ["step_00000004", "step_00000008"]
    assert found_checkpoint(folder, tiny(finished_run, checkpoint={"interval": 4})) == folder.checkpoint_path(8)


def test_resume_never_refuses_a_folder_that_holds_a_run(tiny: Configure, finished_run: Path) -> None:
    with pytest.raises(UserError, match=f"--run-dir {finished_run} holds a run; --resume auto resumes it"):
        found_checkpoint(RunFolder(finished_run), tiny(finished_run, resume="never"))


def test_other_configuration_is_refused_with_its_differences(tiny: Configure, finished_run: Path) -> None:
    other = tiny(finished_run, model={"n_layer": 3}, seed=1)
    with pytest.raises(
        UserError, match=r"configuration: seed is 1337 in the run and 1 in this .*, model\.n_layer is 2 "
    ):
        found_checkpoint(RunFolder(finished_run), other)


@pytest.mark.parametrize("place", ["", "checkpoints/step_00000004"])
def test_named_checkpoint_is_forked_into_another_folder(
    tiny: Configure, finished_run: Path, tmp_path: Path, place: str
) -> None:
    named = finished_run / place
    expected = RunFolder(finished_run).checkpoint_path(4 if place else 8)
    assert found_checkpoint(RunFolder(tmp_path / "new"), tiny(tmp_path / "new", resume=str(named))) == expected


def test_fork_with_another_configuration_is_refused(tiny: Configure, finished_run: Path, tmp_path: Path) -> None:
    config = tiny(tmp_path / "new", resume=str(finished_run), model={"n_embd": 32})
    with pytest.raises(UserError, match=r"model\.n_embd is 16 in the run and 32 in this command"):
        found_checkpoint(RunFolder(tmp_path / "new"), config)


@pytest.mark.parametrize(
    ("launched", "named"),
    [
        *(("auto", "."), ("auto", "checkpoints/step_00000004")),
        *(("checkpoints/step_00000008", ".."), ("checkpoints/step_00000008", "checkpoints/step_00000004")),
    ],
)
def test_folder_of_a_run_with_another_start_is_refused(
    launched: str, named: str, tiny: Configure, finished_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Name paths relative to another run's folder, in which `auto` might be one."""
    monkeypatch.chdir(finished_run)
    folder, resume = RunFolder(tmp_path), "auto" if launched == "auto" else str(finished_run / launched)
    folder.config.write_text(tiny(tmp_path, resume=resume).model_dump_json())
    with pytest.raises(UserError, match="holds a run that did not start from"):
        found_checkpoint(folder, tiny(tmp_path, resume=named))


def test_run_may_be_named_by_its_folder_or_its_newest_checkpoint(tiny: Configure, finished_run: Path) -> None:
    folder = RunFolder(finished_run)
    for named in (finished_run, folder.checkpoint_path(8), os.path.relpath(finished_run)):
        assert found_checkpoint(folder, tiny(finished_run, resume=str(named))) == folder.checkpoint_path(8)


def test_run_never_goes_back_over_its_own_steps(tiny: Configure, finished_run: Path) -> None:
    folder = RunFolder(finished_run)
    with pytest.raises(UserError, match=r"is not the newest checkpoint of its run.*; .* use another --run-dir"):
        found_checkpoint(folder, tiny(finished_run, resume=str(folder.checkpoint_path(4))))


def test_named_run_without_a_checkpoint_does_not_start_at_step_0(tiny: Configure, tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    folder.config.write_text(tiny(tmp_path).model_dump_json())
    assert found_checkpoint(folder, tiny(tmp_path)) is None
    with pytest.raises(UserError, match="holds no checkpoint"):
        found_checkpoint(folder, tiny(tmp_path, resume=str(tmp_path)))


def test_configuration_of_the_checkpoint_decides_not_that_of_a_launch_without_steps(
    tiny: Configure, finished_run: Path, tmp_path: Path
) -> None:
    shutil.copytree(finished_run / "checkpoints", tmp_path / "checkpoints")
    folder = RunFolder(tmp_path)
    folder.config.write_text(tiny(tmp_path, grad_clip=2).model_dump_json())
    with pytest.raises(UserError, match=r"grad_clip is 1\.0 in the run and 2\.0 in this command"):
        found_checkpoint(folder, tiny(tmp_path, grad_clip=2))
    assert found_checkpoint(folder, tiny(tmp_path)) == folder.checkpoint_path(8)


def test_checkpoint_of_a_newer_format_is_not_skipped(tiny: Configure, finished_run: Path, tmp_path: Path) -> None:
    shutil.copytree(finished_run, tmp_path, dirs_exist_ok=True)
    manifest = tmp_path / "checkpoints/step_00000008/manifest.json"
    manifest.write_text(json.dumps({"format_version": CHECKPOINT_FORMAT_VERSION + 1}))
    with pytest.raises(UserError, match="format"):
        found_checkpoint(RunFolder(tmp_path), tiny(tmp_path))


def test_fork_killed_before_its_first_checkpoint_starts_at_the_same_checkpoint(
    tiny: Configure, finished_run: Path, tmp_path: Path
) -> None:
    start = RunFolder(finished_run).checkpoint_path(4)
    folder = RunFolder(tmp_path)
    folder.config.write_text(tiny(tmp_path, resume=str(start)).model_dump_json())
    config = tiny(tmp_path)
    assert found_checkpoint(folder, config) == start
    assert folder.record_origin(config, start).resume == str(start)


def test_forked_checkpoint_is_recorded_and_kept(tiny: Configure, finished_run: Path, tmp_path: Path) -> None:
    folder, start = RunFolder(tmp_path), RunFolder(finished_run).checkpoint_path(8)
    for resume, recorded in (("never", "auto"), ("auto", "auto")):
        assert folder.record_origin(tiny(tmp_path, resume=resume), None).resume == recorded
    fork = tiny(tmp_path, resume=str(finished_run))
    folder.config.write_text(folder.record_origin(fork, start).model_dump_json())
    for again in (str(finished_run), f"{finished_run}/", str(start), os.path.relpath(finished_run)):
        assert found_checkpoint(folder, tiny(tmp_path, resume=again)) == start
    assert folder.record_origin(tiny(tmp_path), start).resume == str(start.resolve())
    with pytest.raises(UserError, match="did not start from"):
        found_checkpoint(folder, tiny(tmp_path, resume=str(RunFolder(finished_run).checkpoint_path(4))))


def test_init_from_need_not_be_repeated(tiny: Configure, finished_run: Path, tmp_path: Path) -> None:
    shutil.copytree(finished_run / "checkpoints", tmp_path / "checkpoints")
    folder = RunFolder(tmp_path)
    folder.config.write_text(tiny(tmp_path, init_from="/gone").model_dump_json())
    assert found_checkpoint(folder, tiny(tmp_path)) == folder.checkpoint_path(8)
    assert found_checkpoint(folder, tiny(tmp_path, init_from="/gone")) == folder.checkpoint_path(8)
    assert folder.record_origin(tiny(tmp_path), None).init_from == Path("/gone")
    with pytest.raises(UserError, match="init_from is /gone in the run and /other in this command"):
        found_checkpoint(folder, tiny(tmp_path, init_from="/other"))


@pytest.mark.parametrize("code", [errno.ESTALE, errno.EACCES, errno.EMFILE, errno.ENOMEM])
def test_checkpoint_that_cannot_be_read_now_is_neither_skipped_nor_moved_aside(
    code: int, tiny: Configure, finished_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = RunFolder(Path(shutil.copytree(finished_run, tmp_path, dirs_exist_ok=True)))
    before = folder.list_step_folders()
    fail_to_hash(folder.checkpoint_path(8) / "model.safetensors", code, monkeypatch)
    with pytest.raises(OSError, match=os.strerror(code)) as error:
        claim_start(folder, tiny(tmp_path), "cpu", dry_run=False)
    assert error.value.filename == str(folder.checkpoint_path(8) / "model.safetensors")
    assert folder.list_step_folders() == before
    unlock_folder(tmp_path)


def test_checkpoint_on_a_lost_block_of_the_disk_is_skipped(
    tiny: Configure, finished_run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = RunFolder(finished_run)
    fail_to_hash(folder.checkpoint_path(8) / "model.safetensors", errno.EIO, monkeypatch)
    start = find_start(folder, tiny(finished_run), "cpu")
    assert start.checkpoint == folder.checkpoint_path(4)
    reason = f"{folder.checkpoint_path(8) / 'model.safetensors'}: cannot be read: Input/output error"
    assert start.damaged == ((folder.checkpoint_path(8), reason),)


def fail_to_hash(file: Path, code: int, monkeypatch: pytest.MonkeyPatch) -> None:
    def hash_or_fail(path: Path, *, follow_links: bool = True) -> str:
        if path == file:
            raise OSError(code, os.strerror(code))
        return sha256_of_file(path, follow_links=follow_links)

    monkeypatch.setattr(manifest, "sha256_of_file", hash_or_fail)


def test_folder_without_config_json_is_not_mixed_with_another_run(tiny: Configure, tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    folder.metrics.touch()
    with pytest.raises(UserError, match=r"holds a run without its config\.json"):
        found_checkpoint(folder, tiny(tmp_path))


def test_run_folder_at_in_or_above_a_source_is_refused(tiny: Configure, tmp_path: Path) -> None:
    texts = tmp_path / "texts"
    texts.mkdir()
    (texts / "a.txt").write_text("a text " * 1000)
    for run_dir in (texts, texts / "run", tmp_path):
        with pytest.raises(UserError, match=f"^--run-dir {run_dir} .*the source {texts}"):
            open_run(tiny(run_dir, data={"source": [str(texts)]}))
    with pytest.raises(UserError, match=f"^--run-dir {texts} .*the source {texts}"):
        open_run(tiny(texts, data={"val_source": [str(texts)]}))
    assert [path.name for path in texts.iterdir()] == ["a.txt"]


def test_weights_of_another_run_are_noted_in_the_plan(tiny: Configure, finished_run: Path, tmp_path: Path) -> None:
    checkpoint = finished_run / "checkpoints" / "step_00000008"
    val_loss = read_checkpoint_manifest(checkpoint).metrics["val/loss"]
    with open_run(tiny(tmp_path / "tuned", init_from=finished_run), dry_run=True) as run:
        assert f"weights from {checkpoint}, step 8, val/loss {val_loss:.4f}" in run.plan.notes
