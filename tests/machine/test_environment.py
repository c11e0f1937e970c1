import json
import platform
import subprocess

import pytest
import torch

from gpt.machine import environment as module
from gpt.machine.environment import describe_environment, find_git_commit


def test_environment_is_json_and_names_versions() -> None:
    facts = json.loads(json.dumps(describe_environment({"threads": torch.get_num_threads()})))
    assert facts["libraries"]["torch"] == torch.__version__
    assert facts["python"] == platform.python_version()
    assert facts["threads"] == facts["runtime"]["threads"] == torch.get_num_threads()


def test_environment_records_how_the_user_lets_threads_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GOMP_SPINCOUNT", "7")
    facts = describe_environment({"sleep_when_busy": False})
    assert facts["variables"]["GOMP_SPINCOUNT"] == "7"
    assert facts["runtime"]["sleep_when_busy"] is False


def test_git_commit_is_that_of_the_checkout() -> None:
    head = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, cwd=module.PACKAGE)
    if head.returncode:
        assert find_git_commit() is None
    else:
        assert (find_git_commit() or "").removesuffix("-dirty") == head.stdout.strip()


def test_version_of_torch_names_its_build(monkeypatch: pytest.MonkeyPatch) -> None:
    """Use metadata without the build, as PyPI's own Linux build has them."""
    monkeypatch.setattr(torch, "__version__", "2.13.0+cu130")
    monkeypatch.setattr(module.metadata, "version", lambda name: "2.13.0")
    assert describe_environment({})["libraries"]["torch"] == "2.13.0+cu130"
