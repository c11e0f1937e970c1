"""Places that are not like ours: other folders, moved and renamed files, links, no home, no locks, closed streams."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from gpt.commands import prepare as prepare_command
from gpt.main import main
from tests.conftest import make_text

MAIN = Path(__file__).resolve().parents[2] / "gpt" / "main.py"


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return the current folder of a user with a text, a cache beside it, and nothing else."""
    folder = tmp_path / "project"
    folder.mkdir()
    (folder / "rep.txt").write_text(make_text(2000))
    monkeypatch.chdir(folder)
    return folder


def train(*flags: str | Path, steps: int, source: str | Path = "rep.txt", run_dir: str | Path = "rd") -> int:
    words = [
        "train",
        "debug",
        "--max-steps",
        str(steps),
        "--device",
        "cpu",
        "--sample.prompts",
        "--lr.decay-steps",
        "9",
    ]
    words += ["--data.source", str(source), "--run-dir", str(run_dir), "--eval.interval", "0", *map(str, flags)]
    return main([*words, *([] if "--data.cache-dir" in words else ["--data.cache-dir", "../cache"])])


def read_steps(run_dir: Path) -> list[int]:
    """Return the steps with a training loss."""
    return list(read_losses(run_dir))


def read_losses(run_dir: Path) -> dict[int, float]:
    records = map(json.loads, (run_dir / "metrics.jsonl").read_text().splitlines())
    return {record["step"]: record["train/loss"] for record in records if "train/loss" in record}


def move_away(project: Path) -> Path:
    target = project.parent / "scratch"
    target.mkdir()
    return (project / "rep.txt").rename(target / "rep.txt")


def rename(project: Path) -> Path:
    return (project / "rep.txt").rename(project / "renamed.txt")


def link(project: Path) -> Path:
    target = project / "link.txt"
    target.symlink_to("rep.txt")
    return target


SPELLINGS: dict[str, Callable[[Path], str | Path]] = {
    "dot": lambda _: "./rep.txt",
    "absolute": lambda project: project / "rep.txt",
    "through the parent": lambda project: f"../{project.name}/rep.txt",
    "moved": move_away,
    "renamed": rename,
    "link": link,
}


@pytest.mark.parametrize("spelling", SPELLINGS)
def test_run_resumes_with_the_same_text_under_another_path(
    spelling: str, project: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert train(steps=2) == 0
    assert train(steps=4, run_dir="reference") == 0
    source = SPELLINGS[spelling](project)
    capsys.readouterr()
    assert train(steps=4, source=source) == 0
    shown = " ".join(capsys.readouterr().out.split())
    assert ("changed at step 2: data.source" in shown) == (spelling in ("moved", "renamed"))
    assert read_steps(project / "rd") == [1, 2, 3, 4]
    assert read_losses(project / "rd") == read_losses(project / "reference")
    assert main(["data-at", "rd", "--step", "3"]) == 0


def test_run_with_another_text_is_refused_and_both_are_named(project: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert train(steps=2) == 0
    other = project / "other.txt"
    other.write_text(make_text(2000, seed=1))
    assert train(steps=4, source=other) == 2
    shown = capsys.readouterr().err
    assert "the corpus's SHA-256 is" in shown
    assert f"data.source was ['{project / 'rep.txt'}'] and is ['{other}']" in shown
    assert shown.count("\n") == 1


def test_tokenizer_file_is_compared_by_its_content(project: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert train(steps=2) == 0
    tokenizer = shutil.copy(project / "rd" / "tokenizer.json", project / "t.json")
    assert train("--data.tokenizer", "t.json", steps=2, run_dir="by_file") == 0
    moved = Path(tokenizer).rename(project.parent / "moved.json")
    assert train("--data.tokenizer", moved, steps=4, run_dir="by_file") == 0
    capsys.readouterr()
    assert train("--data.tokenizer", "char", steps=4) == 2
    assert "data.tokenizer is byte in the run and char in this command" in capsys.readouterr().err
    moved.write_text(moved.read_text().replace("<|endoftext|>", "<|end|>"))
    assert train("--data.tokenizer", moved, steps=5, run_dir="by_file") == 2
    assert "cannot be resumed: the corpus's SHA-256 is" in capsys.readouterr().err


def make_relative(config: Path, project: Path) -> None:
    """Write the paths as a former version saved them: as they were typed."""
    saved = json.loads(config.read_text())
    saved["run_dir"], saved["data"]["source"], saved["data"]["cache_dir"] = "rd", ["rep.txt"], "../cache"
    config.write_text(json.dumps(saved))


@pytest.mark.parametrize("is_former", [False, True])
def test_saved_configuration_works_from_another_folder(
    is_former: bool, project: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert train(steps=2) == 0
    saved = json.loads((project / "rd/config.json").read_text())
    assert saved["data"]["source"] == [str(project / "rep.txt")]
    assert (saved["run_dir"], saved["data"]["cache_dir"]) == (str(project / "rd"), str(project.parent / "cache"))
    if is_former:
        make_relative(project / "rd/config.json", project)
    elsewhere = project.parent / "elsewhere"
    elsewhere.mkdir()
    monkeypatch.chdir(elsewhere)
    assert main(["data-at", "../project/rd", "--step", "1"]) == 0
    capsys.readouterr()
    assert main(["train", "--config", "../project/rd/config.json", "--max-steps", "3"]) == 0
    assert read_steps(project / "rd") == [1, 2, 3]
    assert main(["train", "--config", "../project/rd/config.json", "--run-dir", "again"]) == 0
    assert list(elsewhere.iterdir()) == [elsewhere / "again"]


def test_origin_of_a_run_is_recognized_after_it_was_moved(project: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert train(steps=2) == 0
    assert train("--init-from", "rd", steps=2, run_dir="tuned") == 0
    assert train("--resume", "rd", steps=3, run_dir="fork") == 0
    shutil.copytree("rd", "other")
    (project / "rd").rename(project / "moved")
    assert train("--init-from", "moved", steps=3, run_dir="tuned") == 0
    assert train("--resume", "moved", steps=4, run_dir="fork") == 0
    assert train(steps=3, run_dir="other") == 0
    (step,) = (project / "other" / "checkpoints").glob("*3")
    capsys.readouterr()
    assert train("--init-from", step, steps=4, run_dir="tuned") == 2
    assert f"init_from is {project / 'rd'} in the run and {step} in this command" in capsys.readouterr().err
    assert train("--resume", step, steps=5, run_dir="fork") == 2
    assert f"holds a run that did not start from {step}" in capsys.readouterr().err


def test_checkpoints_on_another_disk_belong_to_their_run(project: Path) -> None:
    disk = project.parent / "disk"
    disk.mkdir()
    (project / "rd").mkdir()
    (project / "rd/checkpoints").symlink_to(disk)
    assert train(steps=2) == 0
    (project / "link").symlink_to("rd")
    for place in (
        "rd",
        "link",
        "link/checkpoints/step_00000002",
        "rd/checkpoints/step_00000002",
        "rd/../rd/checkpoints/step_00000002",
    ):
        assert main(["sample", place, "--max-new-tokens", "2"]) == 0
        assert main(["verify", "rd"]) == 0
    assert main(["data-at", "link", "--step", "1"]) == 0
    assert train("--init-from", "rd", steps=1, run_dir="tuned") == 0
    assert train("--resume", "rd", steps=3, run_dir="fork") == 0
    assert json.loads((project / "fork/config.json").read_text())["resume"] == str(
        project / "rd/checkpoints/step_00000002"  # below which its journal is found, unlike below the disk's path
    )
    for named in ("rd", "link", "rd/checkpoints/step_00000002", disk / "step_00000002"):
        assert train("--resume", named, steps=2) == 0
        assert train("--resume", named, steps=3, run_dir="fork") == 0


def test_tilde_makes_no_folder_of_that_name(
    project: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    home = project.parent / "home"
    home.mkdir()
    monkeypatch.setenv("HOME", str(home))
    shutil.copy("rep.txt", home / "rep.txt")
    assert train("--max-steps=2", steps=2, source="~/rep.txt", run_dir="~/rd") == 0
    assert str(home / "rd") in capsys.readouterr().out.replace("\n", "")
    assert read_steps(home / "rd") == [1, 2]
    assert main(["sample", "~/rd", "--max-new-tokens", "2"]) == 0
    assert main(["verify", "~/rd"]) == 0
    assert main(["train", "--config=~/rd/config.json", "--max-steps", "2"]) == 0
    assert sorted(path.name for path in project.iterdir()) == ["rep.txt"]


NO_HOME = """
import pwd, sys
def forget(*_):
    raise KeyError("uid not found")
pwd.getpwuid = forget
sys.argv = ["gpt", *sys.argv[1:]]
from gpt.main import program
program()
"""


@pytest.mark.parametrize("home", [{}, {"HOME": ""}])
def test_every_command_works_without_a_home(home: dict[str, str], project: Path) -> None:
    temporary = project.parent / "temporary"
    temporary.mkdir()
    environment = {"PATH": os.environ["PATH"], "PYTHONPATH": str(MAIN.parents[1]), "TMPDIR": str(temporary)}
    environment |= {"COLUMNS": "300", **home}

    def run(*arguments: str) -> str:
        command = [sys.executable, "-c", NO_HOME, *arguments]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
        assert done.returncode == 0, done.stderr
        return done.stdout

    assert run("--version").startswith("gpt-training-pipeline")
    assert "--data.cache-dir" in run("train", "--help-all")
    flags = ("--data.source", "rep.txt", "--run-dir", "rd", "--max-steps", "1", "--device", "cpu", "--sample.prompts")
    shown = " ".join(run("train", "debug", *flags, "--data.workers", "1").split())
    cache = temporary / f"gpt-training-pipeline-{os.getuid()}"
    assert f"there is no home folder, so prepared tokens are in {cache}; --data.cache-dir names another" in shown
    assert run("sample", "rd", "--max-new-tokens", "2")
    assert run("verify", "rd")
    assert sorted(path.name for path in project.iterdir()) == ["rd", "rep.txt"]
    assert any(cache.glob("*/corpus.json"))
    environment["XDG_CACHE_HOME"] = str(project.parent / "xdg")
    assert "no home" not in run("train", "debug", *flags, "--dry-run")
    assert any((project.parent / "xdg").glob("*/*/corpus.json"))


NO_FLOCK = """
#include <errno.h>
#include <stdlib.h>
int flock(int fd, int op) { errno = atoi(getenv("FLOCK_ERRNO")); return -1; }
"""


@pytest.fixture(scope="module")
def no_flock(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a library that replaces flock by one that fails with FLOCK_ERRNO."""
    if shutil.which("gcc") is None:
        pytest.skip("needs gcc")
    folder = tmp_path_factory.mktemp("flock")
    (folder / "noflock.c").write_text(NO_FLOCK)
    subprocess.run(["gcc", "-shared", "-fPIC", "-o", folder / "noflock.so", folder / "noflock.c"], check=True)
    return folder / "noflock.so"


@pytest.mark.parametrize("code", [1, 13, 22, 37, 38, 95])
def test_prepare_works_where_the_file_system_has_no_locks(code: int, no_flock: Path, project: Path) -> None:
    command = [sys.executable, str(MAIN), "prepare", "rep.txt", "--out", "made", "--tokenizer", "byte"]
    environment = os.environ | {"LD_PRELOAD": str(no_flock), "FLOCK_ERRNO": str(code)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert done.stderr == (
        f"{Path('.made.lock')}: this file system has no locks ({os.strerror(code)}); make sure that only one process "
        "uses it\n"
    )
    assert (project / "made" / "corpus.json").is_file()


def test_failing_lock_is_one_line_with_path_and_remedy(no_flock: Path, project: Path) -> None:
    command = [sys.executable, str(MAIN), "prepare", "rep.txt", "--out", "made", "--tokenizer", "byte"]
    environment = os.environ | {"LD_PRELOAD": str(no_flock), "FLOCK_ERRNO": "5"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60)
    assert done.returncode == 2
    assert done.stderr == (
        "gpt: error: --out made: .made.lock: Input/output error; delete this file, or name another folder\n"
    )


def current_umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def test_prepared_corpus_in_a_cache_that_is_read_only_needs_no_lock(
    project: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    packed = ("--data.packing", "best-fit")
    assert train(*packed, "--dry-run", steps=1) == 0
    cache = project.parent / "cache"
    assert all(path.stat().st_mode & 0o044 == 0o044 & ~current_umask() for path in cache.rglob("*"))  # others may read
    before = {path: path.stat().st_mtime_ns for path in (cache, *cache.rglob("*"))}

    def refuse(path: Path) -> None:
        raise AssertionError(path)

    monkeypatch.setattr("gpt.data.prepare.preparation.hold_lock", refuse)
    monkeypatch.setattr("gpt.data.packing.hold_lock", refuse)
    assert train(*packed, "--dry-run", steps=1) == 0
    assert {path: path.stat().st_mtime_ns for path in (cache, *cache.rglob("*"))} == before


def test_paths_with_emoji_codes_are_shown_as_they_are(project: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert train(steps=1, run_dir=":smile: [red]") == 0
    assert ":smile: [red]" in capsys.readouterr().out
    assert train(steps=1, run_dir=":smile: [red]") == 0
    assert ":smile: [red] has finished at step 1" in capsys.readouterr().out
    shutil.copy("rep.txt", ":heart:.txt")
    assert main(["prepare", ":heart:.txt", "--out", ":x:", "--tokenizer", "byte"]) == 0
    shown = capsys.readouterr().out
    assert ":heart: train" in shown
    assert ":x:" in shown


@pytest.mark.parametrize("closed", ["<&-", ">&-", "2>&-", "<&- >&- 2>&-"])
def test_closed_streams_end_no_run_and_reach_no_file(closed: str, project: Path) -> None:
    flags = "--data.source rep.txt --run-dir rd --max-steps 2 --device cpu --sample.prompts --data.cache-dir ../cache"
    done = subprocess.run(
        ["sh", "-c", f"{sys.executable} {MAIN} train debug {flags} {closed}"], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stderr
    assert main(["verify", "rd"]) == 0
    failed = subprocess.run(["sh", "-c", f"{sys.executable} {MAIN} train --seed x {closed}"], capture_output=True)
    assert failed.returncode == 2
    assert failed.stdout == b""


def test_descriptors_of_closed_streams_are_taken() -> None:
    code = "import os, sys; from gpt.main import main; main(['--version']); print(os.open(os.devnull, 0), file=report)"
    done = subprocess.run(
        ["sh", "-c", f'{sys.executable} -c "report = open(\'/dev/fd/9\', \'w\'); {code}" 9>&1 <&- >&- 2>&-'],
        capture_output=True, text=True,
    )  # fmt: skip
    assert int(done.stdout) > 2


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (MemoryError(), "not enough memory: MemoryError; lower --workers, or give the process more memory"),
        (RuntimeError("can't start new thread"), "starts no more threads; raise its limits of memory and processes"),
    ],
)
def test_shortage_names_only_flags_that_the_verb_has(
    error: Exception, message: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(_: object) -> int:
        raise error

    monkeypatch.setattr(prepare_command, "run", fail)
    assert main(["prepare", "x", "--out", "y"]) == 2
    shown = capsys.readouterr().err
    assert message in shown
    assert "--micro-batch-size" not in shown
    assert shown.count("\n") == 1


@pytest.mark.parametrize("variables", [{"RANK": ""}, {"RANK": "abc"}, {"WORLD_SIZE": ""}, {"LOCAL_RANK": "x"}])
@pytest.mark.parametrize("arguments", [["--version"], ["train", "debug", "--seed", "x"]])
def test_variables_of_a_launcher_break_no_command(
    variables: dict[str, str], arguments: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    status = main(arguments)
    shown = capsys.readouterr()
    if arguments == ["--version"]:
        assert (status, shown.err) == (0, "")
    else:
        assert (status, shown.err.count("\n")) == (2, 1)
        assert "--seed x: expected a whole number" in shown.err


def test_bad_rank_is_one_line(
    project: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("RANK", "3")
    assert train(steps=1) == 2
    assert capsys.readouterr().err == (
        "gpt: error: RANK is 3, but WORLD_SIZE is not set; unset RANK, or start the ranks with torchrun\n"
    )
