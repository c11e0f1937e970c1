"""Every command of the README that needs no GPU, conda or network, run in order in one folder, shortened by flags."""

import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import make_text

REPOSITORY = Path(__file__).resolve().parents[2]
README = (REPOSITORY / "README.md").read_text(encoding="utf-8")
NOT_HERE = ("pip ", "conda ", "nvidia-smi", "python3 -m venv", "gpt bench speedrun")
SHORTER = "--eval.batches 1 --sample.max-new-tokens 4 --log.interval 1 --device cpu".split()


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README, flags=re.DOTALL)


def commands() -> list[str]:
    """The last part of each line that joins an installation and a command."""
    lines = [line for block in blocks("bash") for line in block.splitlines()]
    parts = [line.split(" && ")[-1] for line in lines]
    return [part for part in parts if not part.startswith((*NOT_HERE, "source "))]


def shortened(command: str) -> list[str]:
    """A training command gets fewer batches and steps, a resumed one a step more than it has done."""
    words = shlex.split(command)
    if (
        {"sample", "prepare", "bench", "verify", "data-at", "verify-resume"} & set(words)
        or "--help" in words
        or words[:2] == ["python", "-c"]
    ):
        return words
    steps = {"--max-steps 500": "3", "debug": None, "--config": None}
    bound = next((steps[name] for name in steps if name in command), "2")
    return [*words, *SHORTER, *(["--max-steps", bound] if bound else [])]


@pytest.fixture(scope="module")
def desk(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that looks like a clone, with the texts that the README speaks of."""
    desk = tmp_path_factory.mktemp("desk")
    (desk / "gpt").symlink_to(REPOSITORY / "gpt")
    (desk / "book.txt").write_text(make_text(3000))
    lines = [json.dumps({"body": make_text(200, seed=index)}) for index in range(40)]
    (desk / "records.jsonl").write_text("\n".join(lines))
    (desk / "my_texts").mkdir()
    for index in range(30):
        (desk / "my_texts" / f"{index}.txt").write_text(make_text(800, seed=index))
    return desk


def test_the_readmes_commands(desk: Path) -> None:
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    environment = os.environ | {"PATH": path, "XDG_CACHE_HOME": str(desk / "cache"), "OMP_NUM_THREADS": "1"}
    ran = commands()
    assert len(ran) >= 15
    for command in ran:
        done = subprocess.run(
            shortened(command), cwd=desk, env=environment, capture_output=True, text=True, timeout=120
        )
        assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
    runs = {path.name for path in (desk / "runs").iterdir()}
    named = {
        "quickstart",
        "debug",
        "wide",
        "debug-again",
        "fork",
        "tuned",
        "mine",
        "book",
        "shakespeare-char",
        "two",
        "records",
        "prepared",
        "mixed",
        "packed",
        "profiled",
    }
    assert runs == named


def test_the_readmes_python(desk: Path) -> None:
    (code,) = blocks("python")
    environment = os.environ | {"XDG_CACHE_HOME": str(desk / "cache"), "OMP_NUM_THREADS": "1"}
    subprocess.run([sys.executable, "-c", code], cwd=desk, env=environment, check=True, timeout=120)
    assert (desk / "runs" / "from-python" / "checkpoints" / "step_00000020").is_dir()


def test_the_two_commands_that_do_everything_are_there() -> None:
    assert "pip install -e . && python gpt/main.py" in README
    assert "pip install -e '.[dev]' && pytest" in README


def test_the_files_that_the_readme_names_exist() -> None:
    named = set(re.findall(r"`((?:gpt|docs|tests)/[\w./-]+)`", README)) | {"CONTRIBUTING.md", "LICENSE"}
    assert [name for name in named if not (REPOSITORY / name).exists()] == []
