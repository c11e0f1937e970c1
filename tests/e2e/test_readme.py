"""Run every command and Python block of README.md and docs/ that needs no GPU, conda or network, shortened by flags.

Each document runs in a folder of its own, from top to bottom, as a reader would run it.
"""

import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import urllib.request
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[2]
README = (REPOSITORY / "README.md").read_text(encoding="utf-8")
DOCUMENTS = {
    path.relative_to(REPOSITORY).as_posix(): path.read_text(encoding="utf-8")
    for path in [REPOSITORY / "README.md", *sorted((REPOSITORY / "docs").glob("*.md"))]
}
RECORDS = [path.relative_to(REPOSITORY).as_posix() for path in sorted((REPOSITORY / "docs" / "adr").glob("*.md"))]
EXCLUDED_COMMANDS = (
    "pip ",
    "conda ",
    "nvidia-smi",
    "python3 -m venv",
    "source ",
    "python -m benchmarks.",
    "gpt bench speedrun",
)
SHORTENING_FLAGS = "--eval.batches 1 --sample.max-new-tokens 4 --log.interval 1 --device cpu".split()
VERBS_TO_RUN_UNCHANGED = {
    "sample",
    "prepare",
    "verify",
    "data-at",
    "verify-resume",
    "export",
    "import",
    "parity",
    "serve",
}
INFO_FLAGS = {"--help", "--help-all", "--version"}
EXPECTED_RUNS = {
    "README.md": {"quickstart", "texts"},
    "docs/data.md": {"texts", "sonnets", "shakespeare-char", "records", "prepared", "mixed", "packed"},
    "docs/distributed.md": {"two"},
    "docs/export.md": {"debug", "imported", "tuned"},
    "docs/failures.md": {"debug"},
    "docs/performance.md": {"profiled"},
    "docs/python.md": {"from-python"},
    "docs/resume.md": {"debug", "fork", "tuned"},
    "docs/run-folder.md": {"debug"},
    "docs/sampling.md": {"debug"},
    "docs/serve.md": {"debug"},
    "docs/training.md": {"debug", "wide", "debug-again", "small"},
}
"""Document -> names of the folders below runs/ that its commands leave."""
MAX_README_BYTES = 9 * 1024


def code_blocks(text: str) -> list[tuple[str, str]]:
    """Return (language, code) of each fenced block in `text`, in order."""
    return re.findall(r"^```(\w*)\n(.*?)^```$", text, flags=re.DOTALL | re.MULTILINE)


def commands_of(block: str) -> list[str]:
    """Return the commands of a bash block to run; of `install && command` the last part."""
    commands = [line.split(" && ")[-1] for line in block.splitlines()]
    return [command for command in commands if not command.startswith(EXCLUDED_COMMANDS)]


def shorten(command: str) -> list[str]:
    """Return the words of a command; a training command gets fewer batches and steps, a resumed one a step more."""
    words = shlex.split(command)
    if (VERBS_TO_RUN_UNCHANGED | INFO_FLAGS) & set(words) or words[:2] == ["python", "-c"]:
        return words
    if "bench" in words:
        return [*words, "--steps", "2"]
    if "selftest" in words:
        return [*words, "--steps", "1", "--kills", "0", "--device", "cpu", "--model.n-embd", "64"]
    max_steps = {"--max-steps 360": "3", "debug": None, "--config": None}
    steps = next((max_steps[name] for name in max_steps if name in command), "2")
    return [*words, *SHORTENING_FLAGS, *(["--max-steps", steps] if steps else [])]


@pytest.fixture(scope="module")
def environment(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    cache = str(tmp_path_factory.mktemp("cache"))
    return os.environ | {"PATH": path, "XDG_CACHE_HOME": cache, "OMP_NUM_THREADS": "1"}


@pytest.fixture
def clone(tmp_path: Path) -> Path:
    """Return a folder with the files that a clone has, and those that an installation compiles."""
    if not (REPOSITORY / ".git").exists():
        pytest.skip("the files of a clone are known in a clone only")
    listing = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    names = subprocess.run(listing, cwd=REPOSITORY, capture_output=True, text=True, check=True).stdout.split("\0")
    compiled = [path.relative_to(REPOSITORY).as_posix() for path in (REPOSITORY / "gpt").rglob("*.so")]
    for name in [*filter(None, names), *compiled]:
        if (REPOSITORY / name).exists():
            (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(REPOSITORY / name, tmp_path / name)
    return tmp_path


@pytest.mark.parametrize("name", [name for name in DOCUMENTS if name != "docs/extending.md"])
def test_commands_and_python_blocks_run(name: str, clone: Path, environment: dict[str, str]) -> None:
    for language, block in code_blocks(DOCUMENTS[name]):
        if language == "bash":
            to_run = [(command, shorten(command)) for command in commands_of(block)]
        else:
            to_run = [(block, [sys.executable, "-c", block])] if language == "python" else []
        for source, words in to_run:
            if words[:2] == ["gpt", "serve"]:
                serve_and_stop(words, clone, environment)
                continue
            done = subprocess.run(words, cwd=clone, env=environment, capture_output=True, text=True, timeout=300)
            assert done.returncode == 0, f"{source}\n{done.stdout}\n{done.stderr}"
    runs = clone / "runs"
    assert ({path.name for path in runs.iterdir()} if runs.exists() else set()) == EXPECTED_RUNS.get(name, set())


def test_three_commands_lead_from_texts_to_an_application(clone: Path, environment: dict[str, str]) -> None:
    train, export, serve = commands_of(next(code for _, code in code_blocks(README) if "gpt export" in code))
    assert train.startswith("gpt train --data.source") and serve.startswith("gpt serve")
    for command in (train, export):
        done = subprocess.run(shorten(command), cwd=clone, env=environment, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stderr
    serve_and_stop(shorten(serve), clone, environment)


def serve_and_stop(words: list[str], folder: Path, environment: dict[str, str]) -> None:
    """Run `gpt serve` on a free port, ask for a completion and for the page, and stop it."""
    pytest.importorskip("fastapi", reason="needs the extra serve")
    command = [*words, "--port", "0", "--device", "cpu"]
    with subprocess.Popen(command, cwd=folder, env=environment, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        lines = iter(process.stdout.readline, "")
        url = next(match[1] for line in lines if (match := re.search(r"serving on (http://127\.0\.0\.1:\d+)/", line)))
        body = json.dumps({"prompt": "the", "max_tokens": 3}).encode()
        request = urllib.request.Request(f"{url}/v1/completions", body, {"Content-Type": "application/json"})
        with urllib.request.urlopen(request, timeout=60) as answer, urllib.request.urlopen(url, timeout=60) as page:
            assert json.load(answer)["usage"]["completion_tokens"] <= 3
            assert b"<title>gpt serve</title>" in page.read()
        process.send_signal(signal.SIGTERM)
        assert process.wait(timeout=60) == 0


def test_documents_hold_the_commands() -> None:
    blocks = [block for name in DOCUMENTS for block in code_blocks(DOCUMENTS[name])]
    assert sum(len(commands_of(code)) for language, code in blocks if language == "bash") >= 35
    assert sum(language == "python" for language, code in blocks) >= 3


def test_readme_holds_the_two_commands_that_do_everything() -> None:
    assert "pip install -e . && python gpt/main.py" in README
    assert "pip install -e '.[dev]' && pytest" in README


def test_readme_is_short() -> None:
    assert len(README.encode()) <= MAX_README_BYTES


def test_files_that_the_readme_tree_names_exist() -> None:
    [tree] = [code for language, code in code_blocks(README) if code.startswith("gpt/\n")]
    parents: list[str] = []
    names = []
    for line in tree.splitlines():
        depth = (len(line) - len(line.lstrip())) // 2
        for name in re.match(r"\s*((?:[\w./-]+(?:/|\.py|\.c)(?:\s+|$))+)", line)[1].split():
            parents[depth:] = [name]
            names.append("".join(parents))
    assert len(names) >= 70
    assert [name for name in names if not (REPOSITORY / name).exists()] == []


@pytest.mark.parametrize("name", [*DOCUMENTS, *RECORDS, "CONTRIBUTING.md", "AGENTS.md"])
def test_files_that_documents_name_exist(name: str) -> None:
    path = REPOSITORY / name
    text = path.read_text(encoding="utf-8")
    files = set(re.findall(r"`((?:gpt|docs|tests|benchmarks|\.ci)/[\w./-]+)`", text))
    assert [file for file in files if not (REPOSITORY / file).exists()] == []
    links = {link.split("#")[0] for link in re.findall(r"\]\(((?!https?:)[^)]+)\)", text)} - {""}
    assert [link for link in links if not (path.parent / link).exists()] == []


def test_every_decision_is_listed_by_its_title() -> None:
    folder = REPOSITORY / "docs" / "adr"
    index = (folder / "README.md").read_text(encoding="utf-8")
    for path in sorted(folder.glob("0*.md")):
        number, title = path.read_text(encoding="utf-8").splitlines()[0].removeprefix("# ").split(". ", 1)
        assert f"| [{number}]({path.name}) | {title} |" in index
