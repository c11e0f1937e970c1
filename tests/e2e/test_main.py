"""The program as a user starts it: commands, exit statuses and output streams."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from gpt.configs.train_config import TrainConfig
from gpt.main import main
from gpt.utils.helper import format_count

REPOSITORY = Path(__file__).resolve().parents[2]
MAIN = REPOSITORY / "gpt" / "main.py"


@pytest.fixture
def flags(text_file: Path, cache_dir: Path, tmp_path: Path) -> list[str]:
    return [
        *("train", "debug", "--run-dir", str(tmp_path / "run"), "--data.source", str(text_file)),
        *("--data.cache-dir", str(cache_dir), "--max-steps", "4", "--sample.max-new-tokens", "4", "--device", "cpu"),
    ]


def run(*command: str, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command, capture_output=True, text=True, timeout=120, cwd=cwd)


def test_three_ways_to_start_run_the_same_program(tmp_path: Path) -> None:
    script = Path(sys.executable).with_name("gpt")
    ways = [(sys.executable, str(MAIN)), (sys.executable, "-m", "gpt.main"), (str(script),)]
    outputs = {run(*way, "train", "debug", "--help", cwd=tmp_path).stdout for way in ways}
    assert len(outputs) == 1
    assert "--model.n-layer" in outputs.pop()


def test_package_folder_is_not_on_the_import_path(tmp_path: Path) -> None:
    code = f"import atexit, runpy, sys; sys.argv = ['main.py', '--help']; sys.path[0] = {str(MAIN.parent)!r}\n"
    code += "atexit.register(lambda: print('', sys.path, sep='\\n'))\n"
    code += f"runpy.run_path({str(MAIN)!r}, run_name='__main__')\n"
    path = run(sys.executable, "-c", code, cwd=tmp_path).stdout.splitlines()[-1]
    assert repr(str(REPOSITORY)) in path
    assert repr(str(MAIN.parent)) not in path


def test_version_is_printed(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--version"]) == 0
    assert capsys.readouterr().out.startswith("gpt-training-pipeline 0.")


def test_help_names_verbs_and_presets(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--help"]) == 0
    shown = capsys.readouterr().out
    for word in ("train", "sample", "quickstart", "shakespeare-char", "gpt2-1558m"):
        assert word in shown


def test_run_trains_and_samples(flags: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(flags) == 0
    shown = capsys.readouterr().out
    assert "finished at step 4" in shown
    assert "xz -9e on the same files" in shown
    assert main(["sample", str(tmp_path / "run"), "--prompt", "the", "--max-new-tokens", "5"]) == 0
    assert capsys.readouterr().out.startswith("the")


def test_same_command_reports_finished_and_a_longer_one_resumes(
    flags: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(flags) == 0
    before = (tmp_path / "run" / "metrics.jsonl").read_text()
    capsys.readouterr()
    assert main(flags) == 0
    assert "has finished at step 4; a larger --max-steps trains on" in capsys.readouterr().out
    assert (tmp_path / "run" / "metrics.jsonl").read_text() == before
    assert main([*flags, "--max-steps", "6"]) == 0
    shown = capsys.readouterr().out
    assert "resuming from" in shown
    assert "finished at step 6" in shown


def test_saved_configuration_repeats_the_run(flags: list[str], tmp_path: Path) -> None:
    assert main(flags) == 0
    config = tmp_path / "run" / "config.json"
    assert main(["train", "--config", str(config), "--run-dir", str(tmp_path / "again")]) == 0
    runs = [(tmp_path / name / "metrics.jsonl").read_text().splitlines() for name in ("run", "again")]
    losses = [[json.loads(line).get("train/loss") for line in lines] for lines in runs]
    assert losses[0] == losses[1]


def test_dry_run_prints_the_plan_and_trains_nothing(
    flags: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*flags, "--dry-run"]) == 0
    shown = capsys.readouterr().out
    assert "4 steps" in shown
    assert "learning rate" in shown
    assert not (tmp_path / "run").exists()


def test_json_of_a_dry_run_equals_the_plain_output(flags: list[str], tmp_path: Path) -> None:
    command = [sys.executable, str(MAIN), *flags, "--dry-run", "--data.cache-dir"]
    plain = run(*command, str(tmp_path / "plain"))
    done = run(*command, str(tmp_path / "json"), "--json")  # an empty cache: preparation logs its progress
    assert (plain.returncode, done.returncode) == (0, 0)
    plan = json.loads(done.stdout)
    assert "preparing" in done.stderr
    assert "preparing" in plain.stdout
    assert plan["max_steps"] == 4
    assert f"{plan['max_steps']} steps, " in plain.stdout
    assert f"{plan['epochs']:.2f} epochs" in plain.stdout
    batch, corpus, model = plan["batch"], plan["corpus"], plan["model"]
    assert (
        f"{batch['tokens_per_step']:,} tokens: {batch['grad_accum_steps']} x {batch['micro_batch_size']}"
        in plain.stdout
    )
    assert plan["tokens"] == plan["max_steps"] * batch["tokens_per_step"]
    assert f"vocabulary {corpus['vocab_size']:,}" in plain.stdout
    assert f"{format_count(corpus['train_tokens'])} training tokens" in plain.stdout
    assert f"{format_count(model['n_parameters'])} parameters: {model['n_layer']} layers" in plain.stdout
    assert plan["lr"]["schedule"] in plain.stdout
    assert all(note in plain.stdout for note in plan["notes"])
    assert not (tmp_path / "run").exists()


def test_json_leaves_errors_on_stderr(flags: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for command, message in (
        ([*flags, "--json"], "--json needs --dry-run"),
        (["verify", str(tmp_path), "--json"], "not a run"),
        (["sample", str(tmp_path), "--json"], "holds no checkpoint"),
        (["data-at", str(tmp_path), "--step", "1", "--json"], "not a run: it has no config.json"),
        (["prepare", "--inspect", str(tmp_path), "--json"], "no prepared corpus"),
        (["verify-resume", "debug", "--kills", "0", "--json"], "--kills 0: must be at least 1"),
    ):
        assert main(command) == 2
        shown = capsys.readouterr()
        assert shown.out == ""
        assert shown.err.startswith("gpt: error: ")
        assert shown.err.count("\n") == 1
        assert message in shown.err


def test_edited_defaults_change_the_command_without_flags(tmp_path: Path) -> None:
    """Edit a file under gpt/configs/ and run `python gpt/main.py`, which has to use the edited default."""
    package = tmp_path / "gpt"
    for path in (REPOSITORY / "gpt").rglob("*.py"):
        target = package / path.relative_to(REPOSITORY / "gpt")
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text(path.read_text())
    train_config = package / "configs" / "train_config.py"
    edited = train_config.read_text().replace("seed: int = Field(1337", "seed: int = Field(4242")
    assert edited != train_config.read_text()
    train_config.write_text(edited)
    shown = run(sys.executable, "gpt/main.py", "train", "--help", cwd=tmp_path).stdout
    assert "(default: 4242)" in shown


def _write(path: Path, content: bytes) -> str:
    path.write_bytes(content)
    return str(path)


BAD_INPUT: dict[str, tuple[Callable[[Path], list[str]], str]] = {
    "unknown flag": (lambda _: ["--lerning-rate", "1"], "unknown flag --lerning-rate"),
    "wrong type": (lambda _: ["--max-steps", "many"], "--max-steps many: expected a whole number"),
    "out of range": (lambda _: ["--grad-clip", "-1"], "--grad-clip -1: must be at least 0"),
    "indivisible": (lambda _: ["--tokens-per-step", "500"], "nearest: 256 or 512"),
    "missing file": (lambda p: ["--data.source", str(p / "none.txt")], "none.txt: no such file or folder"),
    "empty file": (lambda p: ["--data.source", _write(p / "e.txt", b"")], "e.txt: the file is empty"),
    "short text": (lambda p: ["--data.source", _write(p / "s.txt", b"short")], "too few for --model.block-size 64"),
    "shortest text": (lambda p: ["--data.source", _write(p / "s.txt", b"s"), "--data.tokenizer", "char"], "too short"),
    "long name": (lambda _: ["--run-dir", "x" * 300], "File name too long"),
    "too large": (lambda _: ["--model.n-embd", "100000000"], "--model.n-embd 100000000: must be at most"),
    "no memory": (lambda _: ["--model.n-embd", "1000000"], "not enough memory"),
    "control characters": (lambda _: ["--seed", "a\nb\x1b[1m"], r"--seed a\nb\x1b[1m: expected a whole number"),
    "not utf-8": (lambda p: ["--data.source", _write(p / "l.txt", b"caf\xe9!")], "l.txt: not UTF-8 at byte offset 3"),
    "unwritable run folder": (lambda p: ["--run-dir", _write(p / "file", b"") + "/run"], "cannot write there"),
    "no checkpoint": (lambda p: ["--resume", str(p)], "holds no checkpoint"),
    "no weights": (lambda p: ["--init-from", str(p / "none")], "no such folder"),
    "no tokenizer": (lambda p: ["--data.tokenizer", "bpee"], "bpee: no such file; one of byte, char, bpe, gpt2"),
    "no device": (lambda _: ["--device", "gpu"], "--device gpu: did you mean cuda?"),
}


@pytest.mark.parametrize("case", BAD_INPUT)
def test_bad_input_is_one_line_on_stderr_with_status_2(
    case: str, flags: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    change, message = BAD_INPUT[case]
    assert main([*flags, *change(tmp_path)]) == 2
    shown = capsys.readouterr()
    assert shown.err.startswith("gpt: error: ")
    assert shown.err.count("\n") == 1
    assert message in shown.err
    assert not (tmp_path / "run" / "metrics.jsonl").exists()


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        (["--resume", "never"], "holds a run; --resume auto resumes it"),
        (["--model.n-layer", "3"], "another configuration: model.n_layer is 2 in the run and 3 in this command"),
        (["--lr.max-lr", "0.5"], "another configuration: lr.max_lr"),
    ],
)
def test_run_folder_rejects_another_run_and_stays_unchanged(
    extra: list[str], message: str, flags: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(flags) == 0
    files = {path: path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file()}
    assert main([*flags, *extra]) == 2
    assert message in capsys.readouterr().err
    assert {path: path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file()} == files


@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_signal_finishes_the_step_saves_and_the_same_command_resumes(
    number: signal.Signals, status: int, flags: list[str], tmp_path: Path
) -> None:
    endless = [*flags, "--max-steps", "100000", "--checkpoint.interval", "0", "--eval.interval", "0"]
    endless += ["--lr.decay-steps", "1000"]
    process = subprocess.Popen(
        [sys.executable, str(MAIN), *endless], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    metrics = tmp_path / "run" / "metrics.jsonl"
    deadline = time.monotonic() + 60
    while not metrics.exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    process.send_signal(number)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == status, output
    assert f"{number.name} at step" in output
    assert "the same command resumes the run" in output
    saved = [path.name for path in (tmp_path / "run" / "checkpoints").iterdir()]
    step = int(saved[0].removeprefix("step_"))
    assert len(saved) == 1
    assert json.loads(metrics.read_text().splitlines()[-1])["step"] == step
    assert main([*endless, "--max-steps", str(step + 1)]) == 0


def test_closed_stdout_does_not_end_the_run(flags: list[str], tmp_path: Path) -> None:
    reading, writing = os.pipe()
    process = subprocess.Popen([sys.executable, str(MAIN), *flags], stdout=writing, stderr=subprocess.PIPE, text=True)
    os.close(writing)
    os.close(reading)
    _, errors = process.communicate(timeout=60)
    assert "Traceback" not in errors
    assert (tmp_path / "run" / "checkpoints" / "step_00000004").is_dir()
    assert process.returncode == 0


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
@pytest.mark.parametrize("arguments", [["--help"], ["train", "--help"]])
def test_full_output_device_is_one_line(arguments: list[str]) -> None:
    with Path("/dev/full").open("w") as full:
        done = subprocess.run([sys.executable, str(MAIN), *arguments], stdout=full, stderr=subprocess.PIPE, text=True)
    assert (done.returncode, done.stderr) == (2, "gpt: error: output: No space left on device\n")


def test_default_run_folder_is_quickstart() -> None:
    assert TrainConfig().run_dir == Path("runs/quickstart")
