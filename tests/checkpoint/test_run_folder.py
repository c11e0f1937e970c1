import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from gpt.checkpoint.run_folder import RunFolder, locate_checkpoint, run_of
from gpt.configs.train_config import TrainConfig
from gpt.errors import UserError

Configure = Callable[..., TrainConfig]


def test_a_new_folder_starts_afresh(tiny: Configure, tmp_path: Path) -> None:
    assert RunFolder(tmp_path / "new").origin(tiny(tmp_path / "new")) is None


def test_auto_continues_from_the_newest(tiny: Configure, finished_run: Path) -> None:
    folder = RunFolder(finished_run)
    assert [path.name for path in folder.committed()] == ["step_00000004", "step_00000008"]
    assert folder.origin(tiny(finished_run, checkpoint={"interval": 4})) == folder.checkpoint_at(8)


def test_an_uncommitted_folder_is_no_checkpoint(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    for name in (".step_00000003.tmp", ".step_00000002.gone", "step_1", "step_00000001"):
        (folder.checkpoints / name).mkdir(parents=True)
        (folder.checkpoints / name / "manifest.json").touch()
    (folder.checkpoints / "step_00000009").mkdir()
    assert folder.committed() == [folder.checkpoint_at(1)]


def test_never_refuses_a_folder_that_holds_a_run(tiny: Configure, finished_run: Path) -> None:
    with pytest.raises(UserError, match=f"--run-dir {finished_run} holds a run; --resume auto continues it"):
        RunFolder(finished_run).origin(tiny(finished_run, resume="never"))


def test_another_configuration_is_refused_and_told(tiny: Configure, finished_run: Path) -> None:
    other = tiny(finished_run, model={"n_layer": 3}, seed=1)
    with pytest.raises(UserError, match=r"another configuration: seed is 1337 there and 1 here \(and 1 more\)"):
        RunFolder(finished_run).origin(other)


@pytest.mark.parametrize("place", ["", "checkpoints/step_00000004"])
def test_a_named_checkpoint_starts_another_folder(
    tiny: Configure, finished_run: Path, tmp_path: Path, place: str
) -> None:
    start = finished_run / place
    expected = RunFolder(finished_run).checkpoint_at(4 if place else 8)
    assert RunFolder(tmp_path / "new").origin(tiny(tmp_path / "new", resume=str(start))) == expected


def test_a_named_checkpoint_of_another_configuration_is_refused(
    tiny: Configure, finished_run: Path, tmp_path: Path
) -> None:
    config = tiny(tmp_path / "new", resume=str(finished_run), model={"n_embd": 32})
    with pytest.raises(UserError, match=r"model\.n_embd is 16 there and 32 here"):
        RunFolder(tmp_path / "new").origin(config)


def test_a_folder_of_another_start_is_refused(tiny: Configure, finished_run: Path) -> None:
    checkpoint = RunFolder(finished_run).checkpoint_at(4)
    with pytest.raises(UserError, match="holds a run that did not start from"):
        RunFolder(finished_run).origin(tiny(finished_run, resume=str(checkpoint)))


def test_a_fork_that_died_before_its_first_checkpoint_starts_where_it_began(
    tiny: Configure, finished_run: Path, tmp_path: Path
) -> None:
    start = RunFolder(finished_run).checkpoint_at(4)
    folder = RunFolder(tmp_path)
    folder.config.write_text(tiny(tmp_path, resume=str(start)).model_dump_json())
    config = tiny(tmp_path)
    assert folder.origin(config) == start
    assert folder.to_record(config, start).resume == str(start)


def test_where_a_run_began_is_recorded_to_the_checkpoint_and_kept(
    tiny: Configure, finished_run: Path, tmp_path: Path
) -> None:
    folder, start = RunFolder(tmp_path), RunFolder(finished_run).checkpoint_at(8)
    for resume, recorded in (("never", "auto"), ("auto", "auto")):
        assert folder.to_record(tiny(tmp_path, resume=resume), None).resume == recorded
    fork = tiny(tmp_path, resume=str(finished_run))
    folder.config.write_text(folder.to_record(fork, start).model_dump_json())
    for again in (str(finished_run), f"{finished_run}/", str(start), os.path.relpath(finished_run)):
        assert folder.origin(tiny(tmp_path, resume=again)) == start
    assert folder.to_record(tiny(tmp_path), start).resume == str(start.resolve())
    with pytest.raises(UserError, match="did not start from"):
        folder.origin(tiny(tmp_path, resume=str(RunFolder(finished_run).checkpoint_at(4))))


def test_weights_that_a_run_began_with_are_not_asked_for_again(
    tiny: Configure, finished_run: Path, tmp_path: Path
) -> None:
    shutil.copytree(finished_run / "checkpoints", tmp_path / "checkpoints")
    folder = RunFolder(tmp_path)
    folder.config.write_text(tiny(tmp_path, init_from="/gone").model_dump_json())
    assert folder.origin(tiny(tmp_path)) == folder.checkpoint_at(8)
    assert folder.origin(tiny(tmp_path, init_from="/gone")) == folder.checkpoint_at(8)
    assert folder.to_record(tiny(tmp_path), None).init_from == Path("/gone")
    with pytest.raises(UserError, match="init_from is /gone there and /other here"):
        folder.origin(tiny(tmp_path, init_from="/other"))


def test_a_run_without_its_configuration_is_not_mixed_with_another(tiny: Configure, tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    folder.metrics.touch()
    with pytest.raises(UserError, match=r"holds a run without its config\.json"):
        folder.origin(tiny(tmp_path))


def test_what_holds_no_checkpoint_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=f"--resume {tmp_path}: holds no checkpoint"):
        locate_checkpoint(tmp_path, "--resume")
    with pytest.raises(UserError, match="no such folder"):
        locate_checkpoint(tmp_path / "none", "--resume")


def test_a_checkpoint_knows_its_run(finished_run: Path) -> None:
    assert run_of(RunFolder(finished_run).checkpoint_at(4)).path == finished_run.resolve()
