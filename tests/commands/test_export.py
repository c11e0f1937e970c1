import errno
import json
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from gpt.commands.export import run
from gpt.configs.train_config import TrainConfig
from gpt.errors import UserError
from gpt.main import main
from gpt.pipeline import build_trainer
from gpt.run import open_run
from tests.conftest import limit_file_size


@pytest.fixture
def without_runtime(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("gpt.interop.transformers_runtime.is_installed", lambda: False)


@pytest.fixture
def proven(monkeypatch: pytest.MonkeyPatch) -> None:
    """Skip the comparison, which tests/parity does."""
    monkeypatch.setattr("gpt.commands.export._prove_hf", lambda *args: None)


@pytest.mark.parametrize("verb", ["export", "import", "parity"])
def test_help_loads_without_torch(verb: str) -> None:
    code = f"""
import sys, gpt.main
try:
    gpt.main.main(["{verb}", "--help"])
except SystemExit:
    print("torch" in sys.modules)
"""
    help_text = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert f"usage: gpt {verb}" in help_text
    assert help_text.endswith("False\n")


def test_without_the_runtime_the_export_is_not_proven(
    finished_run: Path, tmp_path: Path, without_runtime: None, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run([str(finished_run), "--to", "hf", "--out", str(tmp_path / "out")]) == 0
    assert "not proven: transformers is not installed" in capsys.readouterr().out
    assert "not proven: transformers is not installed" in (tmp_path / "out" / "README.md").read_text()


def test_a_folder_that_exists_is_not_overwritten(finished_run: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"--out .* exists already; name another folder"):
        run([str(finished_run), "--to", "hf", "--out", str(tmp_path)])


def test_a_full_disk_leaves_nothing(finished_run: Path, tmp_path: Path, proven: None) -> None:
    with limit_file_size(20_000), pytest.raises(OSError, match="File too large") as caught:
        run([str(finished_run), "--to", "hf", "--out", str(tmp_path / "out")])
    assert (caught.value.errno, Path(caught.value.filename).name) == (errno.EFBIG, "model.safetensors")
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk_names_the_remedy(
    finished_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fill(folder: Path, *args: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device", str(folder / "model.safetensors"))

    monkeypatch.setattr("gpt.interop.model_folder.write_tensors", fill)
    assert main(["export", str(finished_run), "--to", "hf", "--out", str(tmp_path / "out")]) == 2
    error = capsys.readouterr().err
    assert error.endswith("model.safetensors: No space left on device; free space there\n") and error.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


def test_an_interrupt_leaves_nothing(finished_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(folder: Path, *args: object) -> None:
        assert (folder / "model.safetensors").is_file()
        raise KeyboardInterrupt

    monkeypatch.setattr("gpt.commands.export._prove_hf", interrupt)
    with pytest.raises(KeyboardInterrupt):
        run([str(finished_run), "--to", "hf", "--out", str(tmp_path / "out")])
    assert list(tmp_path.iterdir()) == []


def test_a_model_without_a_class_is_refused_and_says_so_in_its_plan(
    tiny: Callable[..., TrainConfig], tmp_path: Path
) -> None:
    with open_run(tiny(tmp_path / "run", model={"qk_norm": True}, max_steps=1)) as opened:
        assert any(note.startswith("gpt export cannot write this model: no class of") for note in opened.plan.notes)
        build_trainer(opened).train()
    with pytest.raises(UserError, match=r"no class of transformers has --model.qk-norm; nearest: GPT2LMHeadModel"):
        run([str(tmp_path / "run"), "--to", "hf", "--out", str(tmp_path / "out")])
    assert not (tmp_path / "out").exists()


def test_gguf_without_its_runtime_is_not_proven(
    finished_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("gpt.interop.llama_cpp_runtime.is_installed", lambda: False)
    assert run([str(finished_run), "--to", "gguf", "--out", str(tmp_path / "tiny")]) == 0
    assert "not proven: llama-cpp-python is not installed" in capsys.readouterr().out
    assert (tmp_path / "tiny" / "tiny-F32.gguf").is_file()


def test_gguf_needs_its_package(finished_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("gpt.interop.gguf.is_installed", lambda: False)
    with pytest.raises(
        UserError, match=r"--to gguf needs the package gguf: pip install 'gpt-training-pipeline\[gguf\]'"
    ):
        run([str(finished_run), "--to", "gguf", "--out", str(tmp_path / "out")])


def test_a_type_of_another_format_is_refused(finished_run: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="--dtype q8_0 needs --to gguf"):
        run([str(finished_run), "--to", "hf", "--dtype", "q8_0", "--out", str(tmp_path / "out")])


def test_json_names_class_and_weights(
    finished_run: Path, tmp_path: Path, proven: None, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run([str(finished_run), "--to", "hf", "--out", str(tmp_path / "out"), "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert (facts["class"], facts["folder"]) == ("GPT2LMHeadModel", str(tmp_path / "out"))


KILLED_WHILE_PROVING = """
import os, signal, sys
from gpt.commands import export
export._prove_hf = lambda *args: os.kill(os.getpid(), signal.SIGKILL)
export.run(sys.argv[1:])
"""


def test_a_killed_export_leaves_no_folder_and_the_next_one_succeeds(
    finished_run: Path, tmp_path: Path, proven: None, capsys: pytest.CaptureFixture[str]
) -> None:
    argv = [str(finished_run), "--to", "hf", "--out", str(tmp_path / "out")]
    done = subprocess.run([sys.executable, "-c", KILLED_WHILE_PROVING, *argv], capture_output=True)
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert not (tmp_path / "out").exists()
    assert run(argv) == 0
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


KILLED_AT_EVERY_STEP = """
import contextlib, io, os, signal, sys
from pathlib import Path

import torch
from gpt.commands import export
from gpt.main import main

export._prove_hf = export._prove_gguf = lambda *args: None
torch.set_num_threads(1)
out, argv = Path(sys.argv[1]), sys.argv[2:]


def run_and_kill(n):
    seen = 0

    def count(event, args):  # Python reports every file that it opens, makes, renames or removes
        nonlocal seen
        if str(out.parent) in str(args[:1]):
            seen += 1
            if seen == n:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(count)
    with contextlib.redirect_stdout(io.StringIO()):
        status = main(["export", *argv, "--out", str(out)])
    os._exit(status)


with contextlib.redirect_stdout(io.StringIO()):  # imports everything, so that a child does not
    main(["export", *argv, "--out", str(out.parent.with_name("reference"))])
n = 1
while True:
    child = os.fork()
    if not child:
        run_and_kill(n)
    if os.waitpid(child, 0)[1] == 0:
        break
    files = sorted(path.name for path in out.iterdir()) if out.exists() else []
    print(n, *files, flush=True)
    if files:  # committed: the next export may not find it
        for path in out.iterdir():
            path.unlink()
        out.rmdir()
    n += 1
print(0, *sorted(path.name for path in out.iterdir()))
print(*[path.name for path in out.parent.iterdir()])
"""


@pytest.mark.faults
@pytest.mark.parametrize("to", ["hf", "gguf"])
def test_an_export_that_is_killed_at_any_step_leaves_nothing_or_all(
    finished_run: Path, tmp_path: Path, to: str
) -> None:
    command = [sys.executable, "-c", KILLED_AT_EVERY_STEP, str(tmp_path / "out"), str(finished_run), "--to", to]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    *killed, complete, leftovers = [line.split() for line in done.stdout.splitlines()]
    expected = {"hf": 6, "gguf": 2}[to]
    assert len(complete) == 1 + expected
    assert len(killed) >= 10
    assert {tuple(files) for _, *files in killed} <= {(), tuple(complete[1:])}
    assert killed[0][1:] == []
    assert leftovers == ["out"]
