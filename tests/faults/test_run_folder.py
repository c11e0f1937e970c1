"""Faults in a run folder: damaged checkpoints, full and read-only disks, a second run, ranks that see other files."""

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


def flip_bit(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 4
    file.write_bytes(content)


def truncate(file: Path) -> None:
    os.truncate(file, file.stat().st_size // 2)


def truncate_to_zero(file: Path) -> None:
    os.truncate(file, 0)


DAMAGES: dict[str, Callable[[Path], None]] = {
    "bit": flip_bit,
    "truncated": truncate,
    "empty": truncate_to_zero,
    "missing": Path.unlink,
}


@pytest.fixture
def run_dir(finished_run: Path, tmp_path: Path) -> Path:
    """Return a copy of a finished run of eight steps, with checkpoints of steps 4 and 8, that tests may damage."""
    return Path(shutil.copytree(finished_run, tmp_path / "run"))


@pytest.fixture
def flags(text_file: Path, cache_dir: Path) -> list[str]:
    return [
        *("train", "debug", "--data.source", str(text_file), "--data.cache-dir", str(cache_dir), "--device", "cpu"),
        *("--dtype", "float32", "--sample.max-new-tokens", "4", "--lr.decay-steps", "1000"),
    ]


def train(config: TrainConfig) -> None:
    with open_run(config) as run:
        build_trainer(run).train()


def read_losses(run_dir: Path) -> list[tuple[int, float]]:
    lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    return [(line["step"], line["train/loss"]) for line in lines if "train/loss" in line]


def read_lineage(run_dir: Path) -> list[dict[str, object]]:
    return [json.loads(line) for line in (run_dir / "lineage.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("name", FILES)
def test_damaged_checkpoint_is_skipped_with_a_warning_by_auto_and_refused_by_name(
    name: str, damage: str, tiny: Configure, run_dir: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    newest, older = (RunFolder(run_dir).checkpoint_path(step) for step in (8, 4))
    before = sha256_of_file(newest / name)
    DAMAGES[damage](newest / name)
    for target_dir, named in ((run_dir, run_dir), (run_dir, newest), (tmp_path / "fork", newest)):
        with pytest.raises(UserError, match=str(newest)) as error:
            open_run(tiny(target_dir, resume=str(named), max_steps=9))
        if damage == "bit" and name != "manifest.json":
            assert before in str(error.value)
            assert sha256_of_file(newest / name) in str(error.value)
    with open_run(tiny(run_dir)) as run:
        assert (run.start.checkpoint, run.finished_at) == (older, None)
    moved_to = newest.with_name("step_00000008.damaged")
    assert run.start.moved_aside == (moved_to,)
    assert sorted(path.name for path in (run_dir / "checkpoints").iterdir()) == [older.name, moved_to.name]
    skipped, chosen = (record.getMessage() for record in caplog.records if record.levelname == "WARNING")
    assert f"skipped step_00000008, moved aside to {moved_to}: {newest}" in skipped
    assert chosen == f"resuming from {older}, the newest valid checkpoint"


def test_step_of_a_damaged_checkpoint_is_saved_again_bit_exactly(
    tiny: Configure, run_dir: Path, finished_run: Path
) -> None:
    config = tiny(run_dir, checkpoint={"interval": 4})
    for damaged_name in ("step_00000008.damaged", "step_00000008.damaged-2"):
        flip_bit(run_dir / "checkpoints/step_00000008/model.safetensors")
        train(config)
        assert (run_dir / "checkpoints" / damaged_name).is_dir()
        assert read_lineage(run_dir)[-1]["step"] == 4
        assert read_lineage(run_dir)[-1]["moved_aside"] == [str(run_dir / "checkpoints" / damaged_name)]
    for name in ("model.safetensors", "optimizer.safetensors", "progress.json"):
        actual, expected = (path / "checkpoints/step_00000008" / name for path in (run_dir, finished_run))
        assert actual.read_bytes() == expected.read_bytes()
    assert read_losses(run_dir) == read_losses(finished_run)


def test_run_without_a_valid_checkpoint_is_not_restarted_from_step_0(tiny: Configure, run_dir: Path) -> None:
    flip_bit(run_dir / "checkpoints/step_00000004/model.safetensors")
    truncate(run_dir / "checkpoints/step_00000008/optimizer.safetensors")
    before = read_files(run_dir)
    with pytest.raises(UserError, match=r"holds checkpoints and none is valid: .*step_00000008.*step_00000004"):
        open_run(tiny(run_dir))
    after = read_files(run_dir)
    after.pop(".lock")
    before.pop(".lock")
    assert after == before


def test_dry_run_names_the_damaged_checkpoint_and_changes_nothing(
    tiny: Configure, run_dir: Path, caplog: pytest.LogCaptureFixture
) -> None:
    truncate_to_zero(run_dir / "checkpoints/step_00000008/model.safetensors")
    before = read_files(run_dir)
    assert open_run(tiny(run_dir), dry_run=True).start.checkpoint == run_dir / "checkpoints/step_00000004"
    assert "skipped step_00000008: " in caplog.text
    assert read_files(run_dir) == before


@contextmanager
def run_in_background(command: list[str], metrics: Path) -> Iterator[subprocess.Popen[str]]:
    """Start a training process, wait for its first metrics, and kill it at the end of the block."""
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


def test_second_run_is_refused_while_the_first_is_running(
    flags: list[str], text_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    command = [*flags, "--run-dir", str(run)]
    with run_in_background([sys.executable, str(MAIN), *command, *ENDLESS], run / "metrics.jsonl") as process:
        files = [run / name for name in ("config.json", "lineage.jsonl", "tokenizer.json", ".lock")]
        before = [(path.stat().st_ino, path.stat().st_mtime_ns) for path in files]
        second = subprocess.run([sys.executable, str(MAIN), *command, *ENDLESS], capture_output=True, text=True)
        assert second.returncode == 2
        assert second.stderr.count("\n") == 1
        assert second.stderr.startswith(f"gpt: error: --run-dir {run} is in use by process {process.pid} on ")
        assert [(path.stat().st_ino, path.stat().st_mtime_ns) for path in files] == before
        assert process.poll() is None

        assert main([*command, *ENDLESS, "--dry-run"]) == 0
        os.kill(process.pid, signal.SIGSTOP)  # else it might prune the checkpoint while it is read
        assert main(["sample", str(run), "--max-new-tokens", "2"]) == 0
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
        capsys.readouterr()
    step = RunFolder(run).list_checkpoints()[-1].name.removeprefix("step_")
    assert main([*command, *ENDLESS, "--max-steps", str(int(step) + 1)]) == 0
    assert "resuming from" in capsys.readouterr().out


def torchrun_command(*arguments: str) -> list[str]:
    return [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", *arguments]


def test_two_ranks_share_their_run_folder_and_no_other_process_may_use_it(
    flags: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    command = [*flags, "--run-dir", str(run), "--micro-batch-size", "2"]
    with run_in_background(torchrun_command(str(MAIN), *command, *ENDLESS), run / "metrics.jsonl") as process:
        children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
        assert main([*command, *ENDLESS]) == 2
        stderr = capsys.readouterr().err
        assert any(f"is in use by process {pid} on " in stderr for pid in children)
        os.kill(process.pid, signal.SIGTERM)
        process.communicate(timeout=60)
    lock_folder(run, "--run-dir")
    try:
        second = subprocess.run(
            torchrun_command(str(MAIN), *command, *ENDLESS),
            capture_output=True,
            text=True,
            env=os.environ | {"OMP_NUM_THREADS": "1"},
        )
    finally:
        unlock_folder(run)
    assert second.returncode != 0
    assert second.stderr.count(f"gpt: error: --run-dir {run} is in use by process {os.getpid()} on ") == 1


OWN_FOLDER_SCRIPT = """
import os, sys
os.chdir(os.path.join(sys.argv[1], os.environ["RANK"]))
from gpt.main import main
from gpt.utils.launch import end_process
end_process(main(sys.argv[2:]))
"""


@pytest.mark.parametrize(("rank_without_newest", "works"), [(0, True), (1, False)])
def test_rank_0_chooses_the_checkpoint_if_ranks_see_different_ones(
    rank_without_newest: int, works: bool, flags: list[str], tmp_path: Path
) -> None:
    command = [*flags, "--run-dir", "run", "--micro-batch-size", "2", "--checkpoint.interval", "2"]
    assert main([*command, "--run-dir", str(tmp_path / "0/run"), "--max-steps", "4"]) == 0
    shutil.copytree(tmp_path / "0", tmp_path / "1")
    shutil.rmtree(tmp_path / str(rank_without_newest) / "run/checkpoints/step_00000004")
    (tmp_path / "script.py").write_text(OWN_FOLDER_SCRIPT)
    done = subprocess.run(
        torchrun_command(str(tmp_path / "script.py"), str(tmp_path), *command, "--max-steps", "5"),
        capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"}, timeout=120,
    )  # fmt: skip
    if works:
        assert done.returncode == 0, done.stderr
        assert "resuming from run/checkpoints/step_00000002" in done.stdout
        assert [step for step, _ in read_losses(tmp_path / "0/run")] == [1, 2, 3, 4, 5]
    else:
        assert done.returncode != 0
        assert done.stderr.count("gpt: error: ") == 1
        assert "gpt: error: rank 1: it does not see run/checkpoints/step_00000004 as rank 0 does; " in done.stderr
        assert read_losses(tmp_path / "0/run") == read_losses(tmp_path / "1/run")


def read_only_command(folder: Path) -> list[str]:
    """Return a command prefix under which a folder is read-only, even for root."""
    mount = f"mount --bind {folder} {folder} && mount -o remount,bind,ro {folder} && "
    return ["unshare", "-rm", "sh", "-c", mount + 'exec "$@"', "sh"]


def can_mount(folder: Path) -> bool:
    if shutil.which("unshare") is None:
        return False
    return subprocess.run([*read_only_command(folder), "true"], capture_output=True).returncode == 0


@pytest.mark.parametrize("place", [".", "run", "run/checkpoints"])
def test_read_only_folder_is_refused_before_any_work(place: str, flags: list[str], tmp_path: Path) -> None:
    (tmp_path / place).mkdir(parents=True, exist_ok=True)
    if not can_mount(tmp_path / place):
        pytest.skip("needs unshare and the right to mount")
    command = [sys.executable, str(MAIN), *flags, "--run-dir", str(tmp_path / "run"), "--data.source", "/no/such/text"]
    done = subprocess.run([*read_only_command(tmp_path / place), *command], capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr.startswith(f"gpt: error: --run-dir {tmp_path / 'run'}")
    assert done.stderr.endswith("cannot write there: Read-only file system; use another folder\n")
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
def test_forbidden_change_names_every_field_and_changes_no_file(
    change: list[str], message: str, flags: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = [*flags, "--run-dir", str(tmp_path), "--max-steps", "2"]
    assert main(command) == 0
    before = read_files(tmp_path)
    capsys.readouterr()
    assert main([*command, "--max-steps", "4", *change]) == 2
    stderr = capsys.readouterr().err
    assert stderr.count("\n") == 1
    assert message in stderr
    assert read_files(tmp_path) == before


def test_allowed_change_is_shown_recorded_and_needs_its_flag_once(
    flags: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = [*flags, "--run-dir", str(tmp_path), "--max-steps"]
    changed = ["--lr.max-lr", "0.5", "--log.interval", "2"]
    assert main([*command, "2"]) == 0
    assert main([*command, "4", *changed, "--resume-with-changes"]) == 0
    shown = " ".join(capsys.readouterr().out.split())  # joins lines, whose width depends on the terminal
    assert "changed at step 2: lr.max_lr 0.002 -> 0.5 (needs --resume-with-changes)" in shown
    assert "changed at step 2: log.interval 1 -> 2 (safe)" in shown
    assert main([*command, "6", *changed]) == 0
    first, second, third = read_lineage(tmp_path)
    assert (first["step"], first["checkpoint"], first["changes"]) == (0, None, {})
    checkpoint = tmp_path / "checkpoints/step_00000002"
    assert (second["step"], second["checkpoint"]) == (2, str(checkpoint))
    assert second["changes"] == {"max_steps": [2, 4], "lr.max_lr": [0.002, 0.5], "log.interval": [1, 2]}
    assert third["changes"] == {"max_steps": [4, 6]}
    assert (third["world_size"], third["threads"], third["torch"]) == (1, torch.get_num_threads(), torch.__version__)
    assert (third["dtype"], third["micro_batch_size"]) == ("float32", 4)
    assert set(third["runtime"]) >= {"threads", "fused_attention"}
    assert (
        "changed at step 4: max_steps 4 -> 6 (safe where the steps taken keep their learning rates)" in third["notes"]
    )
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
def test_invalid_configuration_is_refused_in_one_line(
    content: str, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "config.json"
    path.write_text(content)
    assert main(["train", "--config", str(path), "--run-dir", str(tmp_path / "run")]) == 2
    stderr = capsys.readouterr().err
    assert stderr.startswith(f"gpt: error: --config {path}: ")
    assert message in stderr
    assert stderr.count("\n") == 1


def test_extended_run_is_bit_exact_with_the_longer_run(tiny: Configure, tmp_path: Path) -> None:
    settings = {"model": {"dropout": 0.1}, "eval": {"interval": 3}, "checkpoint": {"interval": 3, "keep": 0}}
    train(tiny(tmp_path / "long", max_steps=9, **settings))
    for steps in (3, 6, 9):
        train(tiny(tmp_path / "extended", max_steps=steps, **settings))
    for name in ("model.safetensors", "optimizer.safetensors", "progress.json"):
        for step in (3, 6, 9):
            actual, expected = (RunFolder(tmp_path / run).checkpoint_path(step) / name for run in ("extended", "long"))
            assert actual.read_bytes() == expected.read_bytes()
    assert read_losses(tmp_path / "extended") == read_losses(tmp_path / "long")
    assert (tmp_path / "extended/samples.jsonl").read_bytes() == (tmp_path / "long/samples.jsonl").read_bytes()


@pytest.mark.parametrize("years", [-40, 1, 300])
def test_wrong_clock_has_no_effect(years: int, tiny: Configure, run_dir: Path) -> None:
    """Set wrong modification times: checkpoints are found and pruned by their step."""
    now = time.time()
    for path in (run_dir / "checkpoints").rglob("*"):
        wrong = now + 3.2e7 * years * (1 if "step_00000004" in str(path) else -0.5)
        os.utime(path, (wrong, wrong))
    config = tiny(run_dir, max_steps=9, checkpoint={"keep": 2})
    with open_run(config) as run:
        assert run.start.checkpoint == run_dir / "checkpoints/step_00000008"
        build_trainer(run).train()
    assert [path.name for path in RunFolder(run_dir).list_checkpoints()] == ["step_00000008", "step_00000009"]


REWRITE_SCRIPT = """
import sys
from pathlib import Path
from gpt.utils.atomic_io import filter_jsonl
filter_jsonl(Path(sys.argv[1]), lambda record: record["step"] <= 500)
"""


@pytest.mark.skipif(shutil.which("strace") is None, reason="needs strace")
@pytest.mark.parametrize("fault", ["signal=KILL", "error=ENOSPC", "error=EIO"])
@pytest.mark.parametrize(("call", "when"), [("write", 1), ("fsync", 1), ("rename", 1), ("fsync", 2)])
def test_records_are_dropped_atomically(call: str, when: int, fault: str, tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    for step in range(1000):
        append_jsonl(path, {"step": step})
    before = path.read_bytes()
    after = b"".join(before.splitlines(keepends=True)[:501])
    injected = ["strace", "-qq", "-e", f"trace={call}", "-e", f"inject={call}:{fault}:when={when}"]
    done = subprocess.run([*injected, sys.executable, "-c", REWRITE_SCRIPT, str(path)], capture_output=True)
    assert done.returncode != 0
    assert path.read_bytes() == (after if (call, when) == ("fsync", 2) else before) or fault == "signal=KILL"
    assert path.read_bytes() in (before, after)


def test_full_disk_leaves_the_records_unchanged(tiny: Configure, run_dir: Path) -> None:
    before = (run_dir / "metrics.jsonl").read_bytes()
    with (
        open_run(tiny(run_dir, max_steps=9)) as run,
        limit_file_size(200),
        pytest.raises(UserError, match="too large"),
    ):
        build_trainer(run)
    assert (run_dir / "metrics.jsonl").read_bytes() == before
