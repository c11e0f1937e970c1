import os
from pathlib import Path
from types import SimpleNamespace

import pytest

from gpt.configs import user_folders
from gpt.configs.cli import PresetOverrides, parse, parse_over_preset
from gpt.configs.data_config import DataConfig
from gpt.configs.train_config import TrainConfig
from gpt.configs.user_folders import default_cache_dir, expand_home, temporary_folder
from gpt.errors import UserError


@pytest.fixture
def temporary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return the folder that stands for /tmp."""
    monkeypatch.setattr(user_folders.tempfile, "gettempdir", lambda: str(tmp_path))
    return tmp_path


def forget_home(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make this process one whose user id has no entry in the password database and whose HOME is not set."""
    monkeypatch.delenv("HOME", raising=False)
    monkeypatch.setattr(user_folders.os.path, "expanduser", lambda path: path)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)


def test_cache_is_among_temporary_files_without_a_home(temporary: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    forget_home(monkeypatch)
    assert default_cache_dir() == temporary / f"gpt-training-pipeline-{os.getuid()}"


def test_cache_folder_of_the_environment_needs_no_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    forget_home(monkeypatch)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert default_cache_dir() == tmp_path / "gpt-training-pipeline"


def test_cache_that_older_platformdirs_puts_below_a_tilde_is_not_used(
    temporary: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    former = SimpleNamespace(user_cache_dir=lambda name, appauthor: f"~/.cache/{name}")
    monkeypatch.setattr(user_folders, "platformdirs", former)
    assert default_cache_dir() == temporary_folder()


def test_folder_of_another_user_is_not_used(temporary: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = temporary_folder()
    folder.mkdir()
    assert temporary_folder() == folder
    monkeypatch.setattr(user_folders.os, "getuid", lambda: 54321)
    foreign = temporary / "gpt-training-pipeline-54321"
    foreign.mkdir()
    assert temporary_folder() == foreign.with_name(f"{foreign.name}-{os.getpid()}")


def test_tilde_is_expanded_in_every_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    flags = ["--run-dir=~/r", "--init-from=~/i", "--data.source=~/a", "hf:~/b", "--data.val-source", "~/v"]
    flags += ["--data.cache-dir", "~", "--data.tokenizer=~/t.json", "--spike.journal=~/j"]
    flags += ["--data.vocab-size=8192"]  # a section of a file takes its own defaults, not the quickstart recipe
    parsed = parse(TrainConfig, flags, prog="gpt train")
    loaded = TrainConfig.model_validate_json(
        """{"run_dir": "~/r", "init_from": "~/i", "spike": {"journal": "~/j"}, "data": {"source": ["~/a", "hf:~/b"],
        "val_source": "~/v", "cache_dir": "~", "tokenizer": "~/t.json"}}"""
    )
    assert parsed == loaded
    assert (parsed.run_dir, parsed.init_from, parsed.spike.journal) == (tmp_path / "r", tmp_path / "i", tmp_path / "j")
    assert parsed.data.source == (f"{tmp_path}/a", f"hf:{tmp_path}/b")
    assert (parsed.data.val_source, parsed.data.cache_dir) == ((f"{tmp_path}/v",), tmp_path)
    assert parsed.data.tokenizer == f"{tmp_path}/t.json"
    assert TrainConfig(resume="~/r").resume == f"{tmp_path}/r"
    assert DataConfig(source="./~").source == ("./~",)


def test_tilde_without_a_home_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    forget_home(monkeypatch)
    with pytest.raises(ValueError, match=r"^no home folder is known; set HOME, or name the folder in full"):
        expand_home("~/r")
    with pytest.raises(UserError, match="--run-dir '~/r': no home folder is known"):
        parse(TrainConfig, ["--run-dir", "~/r"], prog="gpt train")
    with pytest.raises(UserError, match=r"--config ~/config.json: no home folder is known"):
        parse_over_preset(PresetOverrides, ["--config", "~/config.json"], verb="train")
