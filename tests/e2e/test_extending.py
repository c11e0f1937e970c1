"""Run every recipe of docs/extending.md: apply its diffs to a copy of the package, then run its blocks."""

import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.e2e.test_readme import REPOSITORY, code_blocks

TEXT = (REPOSITORY / "docs" / "extending.md").read_text(encoding="utf-8")
RECIPES = dict(re.findall(r"^## (.*?)\n(.*?)(?=^## |\Z)", TEXT, flags=re.DOTALL | re.MULTILINE))


def apply_diff(diff: str, package_parent: Path) -> None:
    """Apply hunks of `--- FILE` sections, separated by `@@`; context and removed lines must occur once in the file.

    A hunk of one removed line may name a part of a line.
    """
    for section in re.split(r"^--- ", diff, flags=re.MULTILINE)[1:]:
        name, body = section.split("\n", 1)
        path = package_parent / name
        text = path.read_text(encoding="utf-8")
        for hunk in re.split(r"^@@\n", body, flags=re.MULTILINE):
            lines = hunk.splitlines()
            old, new = ("\n".join(line[1:] for line in lines if line[:1] not in skip) for skip in ("+", "-"))
            assert text.count(old) == 1, f"docs/extending.md: {name} has {text.count(old)} times:\n{old}"
            text = text.replace(old, new)
        path.write_text(text, encoding="utf-8")


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache")


@pytest.mark.parametrize("title", RECIPES)
def test_recipe_runs(title: str, cache: Path, tmp_path: Path) -> None:
    shutil.copytree(REPOSITORY / "gpt", tmp_path / "gpt", ignore=shutil.ignore_patterns("__pycache__"))
    blocks = code_blocks(RECIPES[title])
    for language, code in blocks:
        if language == "diff":
            apply_diff(code, tmp_path)
    environment = os.environ | {"PYTHONPATH": str(tmp_path), "XDG_CACHE_HOME": str(cache), "OMP_NUM_THREADS": "1"}
    runs = [[sys.executable, "-c", code] for language, code in blocks if language == "python"]
    for command in "".join(code for language, code in blocks if language == "bash").splitlines():
        runs.append([sys.executable, "-m", "gpt.main", *shlex.split(command.removeprefix("gpt "))])
    assert runs
    for command_line in runs:
        done = subprocess.run(command_line, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, f"{command_line}\n{done.stdout}\n{done.stderr}"


def test_every_extension_point_has_a_recipe() -> None:
    points = "sink observer probe schedule optimizer data-format evaluation-task model-family".split()
    assert [title.split(" ", 1)[1].replace(" ", "-") for title in RECIPES] == points
    for point in points:
        assert re.search(rf"\(#an?-{point}\)", TEXT)
