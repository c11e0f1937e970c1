import json
import subprocess
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from gpt import device_check
from gpt.commands import selftest
from gpt.commands.verify_resume import VerifyResumeCommand
from gpt.configs.batch_plan import plan_batch
from gpt.configs.cli import parse_over_preset
from gpt.configs.run_plan import MachineFacts
from gpt.configs.train_config import TrainConfig
from gpt.device_check import CheckResult
from gpt.errors import UserError

FLAGS = [
    *("debug", "--device", "cpu", "--kills", "0", "--steps", "1", "--micro-batch-size", "1"),
    *("--model.n-embd", "16", "--model.block-size", "16"),
]
CUDA = MachineFacts("cuda", "NVIDIA H100 80GB HBM3", has_bfloat16=True)


def run(cache_dir: Path, capsys: pytest.CaptureFixture[str], *flags: str) -> tuple[int, str]:
    status = selftest.run([*FLAGS, "--data.cache-dir", str(cache_dir), *flags])
    return status, capsys.readouterr().out


def test_report_has_every_check_and_the_speed(cache_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    status, output = run(cache_dir, capsys, "--dtype", "bfloat16", "--json")
    report = json.loads(output)
    assert (status, report["passed"]) == (0, True)
    states = {check["name"]: check["state"] for check in report["checks"]}
    assert len(states) == len(report["checks"]) == 12
    assert states["losses of 20 steps in bfloat16"] == "passed"
    assert states["host syncs of the training step"] == states["bits after 0 kills"] == "not run"
    assert report["figures"]["tokens_per_second"] > 0
    assert report["figures"]["mfu_data_sheet"] is None
    assert report["environment"]["libraries"]["torch"] == torch.__version__
    assert str(cache_dir) not in output  # it is pasted into an issue


def test_wrong_device_fails_and_is_not_trusted_any_more(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = torch.nn.functional.linear

    def check(*arguments: Any) -> Iterator[CheckResult]:
        with monkeypatch.context() as patch:
            patch.setattr(torch.nn.functional, "linear", lambda *tensors: plain(*tensors) * 1.01)
            yield from list(checked(*arguments))

    checked = device_check.check_device
    monkeypatch.setattr(device_check, "check_device", check)
    status, output = run(tmp_path, capsys, "--dtype", "float32")
    assert status == 1
    assert "FAILED   forward pass in float32: error" in output
    assert output.splitlines()[-1].endswith("of 8 checks failed")
    (record,) = tmp_path.glob("device-*.json")
    assert json.loads(record.read_text())["is_right"] is False


def test_passed_check_is_remembered_for_auto(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    status, output = run(tmp_path, capsys, "--dtype", "float32")
    assert (status, output.splitlines()[-1]) == (0, "this device passed every check")
    (record,) = tmp_path.glob("device-*.json")
    assert json.loads(record.read_text())["is_right"] is True


def test_launch_by_torchrun_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "1")
    with pytest.raises(UserError, match="start it without torchrun"):
        selftest.run(FLAGS)


@pytest.mark.parametrize("syncs", [False, True])
def test_host_sync_of_the_training_step_is_found_on_cuda(syncs: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    modes: list[str] = []

    class Step:
        def __call__(self, step: int) -> None:
            if syncs and modes[-1:] == ["error"]:
                raise RuntimeError("called a synchronizing CUDA operation")

        def close(self) -> None:
            modes.append("closed")

    monkeypatch.setattr(torch.cuda, "set_sync_debug_mode", modes.append)
    monkeypatch.setattr(selftest, "plan_synthetic_run", lambda *arguments: None)
    monkeypatch.setattr(selftest, "build_synthetic_step", lambda *arguments: Step())
    dist: Any = SimpleNamespace(device=torch.device("cuda"))
    expected = ("FAILED", "called a synchronizing CUDA operation") if syncs else ("passed", "none in 2 steps")
    assert selftest._find_host_sync(TrainConfig(), CUDA, dist) == expected
    assert modes == ["error", "default", "closed"]


def test_kills_are_of_a_reproducible_run_on_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    launched: list[list[str]] = []
    verdict = {"bit_exact": True, "losses": 20, "tensors": 112}

    def launch(command: list[str], **options: Any) -> subprocess.CompletedProcess[str]:
        launched.append(command[2:])
        return subprocess.CompletedProcess(command, 0, json.dumps(verdict), "")

    monkeypatch.setattr(subprocess, "run", launch)
    monkeypatch.setattr("sys.platform", "linux")
    assert selftest._verify_resume(3, TrainConfig(), CUDA) == (
        "passed",
        "0 differing bits in 20 losses and 112 tensors",
    )
    verb, *flags = launched[0]
    command = parse_over_preset(VerifyResumeCommand, flags, verb=verb)
    assert (command.device, command.kills, command.parallel.reproducible) == ("cuda", 3, True)
    plan_batch(command, world_size=1)  # its micro-batches make a tree


@pytest.mark.parametrize(
    ("stdout", "stderr", "detail"),
    [
        (json.dumps({"bit_exact": False, "first_difference": "step 3: loss"}), "", "step 3: loss"),
        (json.dumps({"bit_exact": False, "error": "cannot be resumed"}), "", "cannot be resumed"),
        ("", "warning\ngpt: error: no GPU\n", "gpt: error: no GPU"),
        ("", "", "verify-resume ended with status 1"),
    ],
)
def test_run_that_differs_after_its_kills_fails(
    stdout: str, stderr: str, detail: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    done = subprocess.CompletedProcess([], 1, stdout, stderr)
    monkeypatch.setattr(subprocess, "run", lambda *arguments, **options: done)
    monkeypatch.setattr("sys.platform", "linux")
    assert selftest._verify_resume(3, TrainConfig(), CUDA) == ("FAILED", detail)
