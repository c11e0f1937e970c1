"""A run's folder under real faults: damage, a full or read-only disk, a second run, ranks that disagree."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

from gpt.checkpoint.run_folder import RunFolder
from gpt.configs.train_config import TrainConfig
from gpt.errors import UserError
from gpt.main import main
from gpt.pipeline import build_trainer
from gpt.run import open_run
from gpt.utils.atomic_io import append_jsonl
from gpt.utils.folder_lock import lock_folder, unlock_folder
from gpt.utils.helper import sha256_of_file
from tests.conftest import limit_file_size, read_files

pytestmark = pytest.mark.faults

Configure = Callable[..., TrainConfig]
Record = Callable[..., tuple[list[float], dict[str, torch.Tensor]]]
MAIN = Path(__file__).resolve().parents[2] / "gpt" / "main.py"
FILES = ("model.safetensors", "optimizer.safetensors", "progress.json", "config.json", "manifest.json")


def flip_a_bit(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 4
    file.write_bytes(content)


def truncate(file: Path) -> None:
    os.truncate(file, file.stat().st_size // 2)


def empty(file: Path) -> None:
    os.truncate(file, 0)


DAMAGES: dict[str, Callable[[Path], None]] = {
    "bit": flip_a_bit,
    "truncated": truncate,
    "empty": empty,
    "missing": Path.unlink,
}


@pytest.fixture
def run_dir(finished_run: Path, tmp_path: Path) -> Path:
    """A run of eight steps with checkpoints of the fourth and the eighth, to do harm to."""
    return Path(shutil.copytree(finished_run, tmp_path / "run"))


@pytest.fixture
def flags(text_file: Path, cache_dir: Path) -> list[str]:
    return [
        *("train", "debug", "--data.source", str(text_file), "--data.cache-dir", str(cache_dir), "--device", "cpu"),
        *("--dtype", "float32", "--sample.max-new-tokens", "4", "--lr.decay-steps", "1000"),
    ]


def train(config: TrainConfig) -> None:
    with open_run(config) as layout:
        build_trainer(layout).train()


def losses(run_dir: Path) -> list[tuple[int, float]]:
    lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    return [(line["step"], line["train/loss"]) for line in lines if "train/loss" in line]


def lineage(run_dir: Path) -> list[dict[str, object]]:
    return [json.loads(line) for line in (run_dir / "lineage.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("name", FILES)
def test_a_damaged_checkpoint_is_skipped_aloud_by_auto_and_refused_by_name(
    name: str, damage: str, tiny: Configure, run_dir: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    newest, older = (RunFolder(run_dir).checkpoint_path(step) for step in (8, 4))
    before = sha256_of_file(newest / name)
    DAMAGES[damage](newest / name)
    for place, named in ((run_dir, run_dir), (run_dir, newest), (tmp_path / "fork", newest)):
        with pytest.raises(UserError, match=str(newest)) as error:
            open_run(tiny(place, resume=str(named), max_steps=9))
        if damage == "bit" and name != "manifest.json":
            assert before in str(error.value)
            assert sha256_of_file(newest / name) in str(error.value)
    with open_run(tiny(run_dir)) as layout:
        assert (layout.start.checkpoint, layout.finished_at) == (older, None)
    aside = newest.with_name("step_00000008.damaged")
    assert layout.start.moved_aside == (aside,)
    assert sorted(path.name for path in (run_dir / "checkpoints").iterdir()) == [older.name, aside.name]
    skipped, chosen = (record.getMessage() for record in caplog.records if record.levelname == "WARNING")
    assert f"skipped step_00000008, moved aside to {aside}: {newest}" in skipped
    assert chosen == f"resuming from {older}, the newest valid checkpoint"


def test_the_step_of_a_damaged_checkpoint_is_saved_again_with_the_same_bits(
    tiny: Configure, run_dir: Path, finished_run: Path
) -> None:
    config = tiny(run_dir, checkpoint={"interval": 4})
    for aside in ("step_00000008.damaged", "step_00000008.damaged-2"):
        flip_a_bit(run_dir / "checkpoints/step_00000008/model.safetensors")
        train(config)
        assert (run_dir / "checkpoints" / aside).is_dir()
        assert lineage(run_dir)[-1]["step"] == 4
        assert lineage(run_dir)[-1]["moved_aside"] == [str(run_dir / "checkpoints" / aside)]
    for name in ("model.safetensors", "optimizer.safetensors", "progress.json"):
        ours, theirs = (path / "checkpoints/step_00000008" / name for path in (run_dir, finished_run))
        assert ours.read_bytes() == theirs.read_bytes()
    assert losses(run_dir) == losses(finished_run)


def test_where_no_checkpoint_is_whole_none_is_started_from_zero(tiny: Configure, run_dir: Path) -> None:
    flip_a_bit(run_dir / "checkpoints/step_00000004/model.safetensors")
    truncate(run_dir / "checkpoints/step_00000008/optimizer.safetensors")
    before = read_files(run_dir)
    with pytest.raises(UserError, match=r"holds checkpoints and none is valid: .*step_00000008.*step_00000004"):
        open_run(tiny(run_dir))
    after = read_files(run_dir)
    after.pop(".lock")
    before.pop(".lock")
    assert after == before


def test_a_dry_run_says_what_it_would_skip_and_leaves_it(
    tiny: Configure, run_dir: Path, caplog: pytest.LogCaptureFixture
) -> None:
    empty(run_dir / "checkpoints/step_00000008/model.safetensors")
    before = read_files(run_dir)
    assert open_run(tiny(run_dir), dry_run=True).start.checkpoint == run_dir / "checkpoints/step_00000004"
    assert "skipped step_00000008: " in caplog.text
    assert read_files(run_dir) == before


@contextmanager
def running(command: list[str], metrics: Path) -> Iterator[subprocess.Popen[str]]:
    """A program that trains, from its first report on; killed at the end of the block."""
    process = subprocess.Popen(
        command, env=os.environ | {"OMP_NUM_THREADS": "1"}, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    try:
        deadline = time.monotonic() + 90
        while not metrics.exists() and process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.05)
        yield process
    finally:
        process.kill()
        process.communicate()


ENDLESS = ("--max-steps", "100000", "--checkpoint.interval", "1", "--eval.interval", "0")


def test_a_second_run_is_refused_while_the_first_lives(
    flags: list[str], text_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    here = [*flags, "--run-dir", str(run)]
    with running([sys.executable, str(MAIN), *here, *ENDLESS], run / "metrics.jsonl") as process:
        kept = [run / name for name in ("config.json", "lineage.jsonl", "tokenizer.json", ".lock")]
        before = [(path.stat().st_ino, path.stat().st_mtime_ns) for path in kept]
        second = subprocess.run([sys.executable, str(MAIN), *here, *ENDLESS], capture_output=True, text=True)
        assert second.returncode == 2
        assert second.stderr.count("\n") == 1
        assert second.stderr.startswith(f"gpt: error: --run-dir {run} is in use by process {process.pid} on ")
        assert [(path.stat().st_ino, path.stat().st_mtime_ns) for path in kept] == before
        assert process.poll() is None

        assert main([*here, *ENDLESS, "--dry-run"]) == 0
        os.kill(process.pid, signal.SIGSTOP)  # so that the checkpoint is not pruned while it is read
        assert main(["sample", str(run), "--max-new-tokens", "2"]) == 0
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
        capsys.readouterr()
    step = RunFolder(run).list_checkpoints()[-1].name.removeprefix("step_")
    assert main([*here, *ENDLESS, "--max-steps", str(int(step) + 1)]) == 0
    assert "continuing from" in capsys.readouterr().out


def torchrun(*arguments: str) -> list[str]:
    return [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", *arguments]


def test_two_processes_of_a_run_share_its_folder_and_no_other_does(
    flags: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    here = [*flags, "--run-dir", str(run), "--micro-batch-size", "2"]
    with running(torchrun(str(MAIN), *here, *ENDLESS), run / "metrics.jsonl") as process:
        children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
        assert main([*here, *ENDLESS]) == 2
        told = capsys.readouterr().err
        assert any(f"is in use by process {pid} on " in told for pid in children)
        os.kill(process.pid, signal.SIGTERM)
        process.communicate(timeout=60)
    lock_folder(run, "--run-dir")
    try:
        second = subprocess.run(
            torchrun(str(MAIN), *here, *ENDLESS),
            capture_output=True,
            text=True,
            env=os.environ | {"OMP_NUM_THREADS": "1"},
        )
    finally:
        unlock_folder(run)
    assert second.returncode != 0
    assert second.stderr.count(f"gpt: error: --run-dir {run} is in use by process {os.getpid()} on ") == 1


ELSEWHERE = """
import os, sys
os.chdir(os.path.join(sys.argv[1], os.environ["RANK"]))
from gpt.main import main
from gpt.utils.launch import end_process
end_process(main(sys.argv[2:]))
"""


@pytest.mark.parametrize(("missing_at", "works"), [(0, True), (1, False)])
def test_where_ranks_see_different_checkpoints_rank_0_decides(
    missing_at: int, works: bool, flags: list[str], tmp_path: Path
) -> None:
    here = [*flags, "--run-dir", "run", "--micro-batch-size", "2", "--checkpoint.interval", "2"]
    assert main([*here, "--run-dir", str(tmp_path / "0/run"), "--max-steps", "4"]) == 0
    shutil.copytree(tmp_path / "0", tmp_path / "1")
    shutil.rmtree(tmp_path / str(missing_at) / "run/checkpoints/step_00000004")
    (tmp_path / "script.py").write_text(ELSEWHERE)
    done = subprocess.run(
        torchrun(str(tmp_path / "script.py"), str(tmp_path), *here, "--max-steps", "5"),
        capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"}, timeout=120,
    )  # fmt: skip
    if works:
        assert done.returncode == 0, done.stderr
        assert "continuing from run/checkpoints/step_00000002" in done.stdout
        assert [step for step, _ in losses(tmp_path / "0/run")] == [1, 2, 3, 4, 5]
    else:
        assert done.returncode != 0
        assert done.stderr.count("gpt: error: ") == 1
        assert "rank 1 failed, and says why; all ranks must see the same files" in done.stderr
        assert losses(tmp_path / "0/run") == losses(tmp_path / "1/run")


def read_only(folder: Path) -> list[str]:
    """A command's beginning that makes a folder read-only for it, for root too."""
    mount = f"mount --bind {folder} {folder} && mount -o remount,bind,ro {folder} && "
    return ["unshare", "-rm", "sh", "-c", mount + 'exec "$@"', "sh"]


def can_mount(folder: Path) -> bool:
    if shutil.which("unshare") is None:
        return False
    return subprocess.run([*read_only(folder), "true"], capture_output=True).returncode == 0


@pytest.mark.parametrize("place", [".", "run", "run/checkpoints"])
def test_a_read_only_folder_is_told_before_anything_is_done(place: str, flags: list[str], tmp_path: Path) -> None:
    (tmp_path / place).mkdir(parents=True, exist_ok=True)
    if not can_mount(tmp_path / place):
        pytest.skip("needs unshare and the right to mount")
    command = [sys.executable, str(MAIN), *flags, "--run-dir", str(tmp_path / "run"), "--data.source", "/no/such/text"]
    done = subprocess.run([*read_only(tmp_path / place), *command], capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr.startswith(f"gpt: error: --run-dir {tmp_path / 'run'}")
    assert done.stderr.endswith("cannot write there: Read-only file system; name another folder\n")
    assert done.stderr.count("\n") == 1


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            ["--model.n-embd", "64"],
            "model.n_embd is 32 in the run and 64 in this command; use the same values or another --run-dir",
        ),
        (
            ["--data.tokenizer", "char"],
            "data.tokenizer is byte in the run and char in this command; use the same values or another",
        ),
        (
            ["--model.n-embd", "64", "--resume-with-changes"],
            "model.n_embd is 32 in the run and 64 in this command; use the same",
        ),
        (
            ["--lr.max-lr", "0.5"],
            "lr.max_lr is 0.002 in the run and 0.5 in this command (--resume-with-changes allows this); use",
        ),
        (
            ["--grad-clip", "9", "--seed", "3", "--optimizer.beta1", "0.5"],
            "seed is 1337 in the run and 3 in this command, grad_clip is 1.0 in the run and 9.0 in this command, "
            "optimizer.beta1 is 0.9 in the run and 0.5 in this command (--resume-with-changes allows this); "
            "use the same values or another --run-dir",
        ),
    ],
)
def test_a_change_that_is_not_allowed_names_every_field_and_touches_nothing(
    change: list[str], message: str, flags: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    here = [*flags, "--run-dir", str(tmp_path), "--max-steps", "2"]
    assert main(here) == 0
    before = read_files(tmp_path)
    capsys.readouterr()
    assert main([*here, "--max-steps", "4", *change]) == 2
    told = capsys.readouterr().err
    assert told.count("\n") == 1
    assert message in told
    assert read_files(tmp_path) == before


def test_an_allowed_change_is_shown_recorded_and_asked_for_once(
    flags: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    here = [*flags, "--run-dir", str(tmp_path), "--max-steps"]
    changed = ["--lr.max-lr", "0.5", "--log.interval", "2"]
    assert main([*here, "2"]) == 0
    assert main([*here, "4", *changed, "--resume-with-changes"]) == 0
    shown = " ".join(capsys.readouterr().out.split())  # whatever the width of the table
    assert "changed at step 2: lr.max_lr 0.002 -> 0.5 (needs --resume-with-changes)" in shown
    assert "changed at step 2: log.interval 1 -> 2 (safe)" in shown
    assert main([*here, "6", *changed]) == 0
    first, second, third = lineage(tmp_path)
    assert (first["step"], first["checkpoint"], first["changes"]) == (0, None, {})
    checkpoint = tmp_path / "checkpoints/step_00000002"
    assert (second["step"], second["checkpoint"]) == (2, str(checkpoint))
    assert second["changes"] == {"max_steps": [2, 4], "lr.max_lr": [0.002, 0.5], "log.interval": [1, 2]}
    assert third["changes"] == {"max_steps": [4, 6]}
    assert (third["world_size"], third["threads"], third["torch"]) == (1, torch.get_num_threads(), torch.__version__)
    config = (tmp_path / "config.json").read_text() + (tmp_path / "checkpoints/step_00000006/config.json").read_text()
    assert "resume_with_changes" not in config


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"sed": 1}', "unknown key sed; did you mean seed?"),
        ('{"lr": {"max_rate": 1}}', "unknown key lr.max_rate; did you mean lr.max_lr?"),
        ('{"max_steps": "many"}', "max_steps many: expected a whole number"),
        ('{"lr": {"max_lr": NaN}}', "lr.max_lr nan: expected a finite number"),
        ('{"grad_clip": -Infinity}', "grad_clip -inf: expected a finite number"),
        ('{"grad_clip": -1}', "grad_clip -1: must be at least 0.0 (nearest: 0.0)"),
        ("[]", "not a JSON object; name another config.json"),
    ],
)
def test_a_configuration_that_is_wrong_is_one_line(
    content: str, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "config.json"
    path.write_text(content)
    assert main(["train", "--config", str(path), "--run-dir", str(tmp_path / "run")]) == 2
    told = capsys.readouterr().err
    assert told.startswith(f"gpt: error: --config {path}: ")
    assert message in told
    assert told.count("\n") == 1


def test_a_finished_run_that_is_extended_is_the_longer_run_to_the_bit(tiny: Configure, tmp_path: Path) -> None:
    settings = {"model": {"dropout": 0.1}, "eval": {"interval": 3}, "checkpoint": {"interval": 3, "keep": 0}}
    train(tiny(tmp_path / "whole", max_steps=9, **settings))
    for steps in (3, 6, 9):
        train(tiny(tmp_path / "parts", max_steps=steps, **settings))
    for name in ("model.safetensors", "optimizer.safetensors", "progress.json"):
        for step in (3, 6, 9):
            ours, theirs = (RunFolder(tmp_path / run).checkpoint_path(step) / name for run in ("parts", "whole"))
            assert ours.read_bytes() == theirs.read_bytes()
    assert losses(tmp_path / "parts") == losses(tmp_path / "whole")
    assert (tmp_path / "parts/samples.jsonl").read_bytes() == (tmp_path / "whole/samples.jsonl").read_bytes()


@pytest.mark.parametrize("years", [-40, 1, 300])
def test_a_clock_that_is_off_has_no_effect(years: int, tiny: Configure, run_dir: Path) -> None:
    """Whatever the clock said: the newest is found, saved and pruned by its step."""
    now = time.time()
    for path in (run_dir / "checkpoints").rglob("*"):
        wrong = now + 3.2e7 * years * (1 if "step_00000004" in str(path) else -0.5)
        os.utime(path, (wrong, wrong))
    config = tiny(run_dir, max_steps=9, checkpoint={"keep": 2})
    with open_run(config) as layout:
        assert layout.start.checkpoint == run_dir / "checkpoints/step_00000008"
        build_trainer(layout).train()
    assert [path.name for path in RunFolder(run_dir).list_checkpoints()] == ["step_00000008", "step_00000009"]


REWRITE = """
import sys
from pathlib import Path
from gpt.utils.atomic_io import filter_jsonl
filter_jsonl(Path(sys.argv[1]), lambda record: record["step"] <= 500)
"""


@pytest.mark.skipif(shutil.which("strace") is None, reason="needs strace")
@pytest.mark.parametrize("fault", ["signal=KILL", "error=ENOSPC", "error=EIO"])
@pytest.mark.parametrize(("call", "when"), [("write", 1), ("fsync", 1), ("rename", 1), ("fsync", 2)])
def test_records_are_dropped_in_one_step_or_not_at_all(call: str, when: int, fault: str, tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    for step in range(1000):
        append_jsonl(path, {"step": step})
    before = path.read_bytes()
    after = b"".join(before.splitlines(keepends=True)[:501])
    injected = ["strace", "-qq", "-e", f"trace={call}", "-e", f"inject={call}:{fault}:when={when}"]
    done = subprocess.run([*injected, sys.executable, "-c", REWRITE, str(path)], capture_output=True)
    assert done.returncode != 0
    assert path.read_bytes() == (after if (call, when) == ("fsync", 2) else before) or fault == "signal=KILL"
    assert path.read_bytes() in (before, after)


def test_a_full_disk_leaves_the_records_as_they_were(tiny: Configure, run_dir: Path) -> None:
    before = (run_dir / "metrics.jsonl").read_bytes()
    with (
        open_run(tiny(run_dir, max_steps=9)) as layout,
        limit_file_size(200),
        pytest.raises(UserError, match="too large"),
    ):
        build_trainer(layout)
    assert (run_dir / "metrics.jsonl").read_bytes() == before
