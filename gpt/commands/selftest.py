"""`gpt selftest [PRESET] [--flags]`: check that this device trains as the CPU does, and measure it."""

import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import Field

from gpt.commands.bench import MAIN, build_synthetic_step, format_rows, measure_step, plan_synthetic_run
from gpt.commands.output import build_console, print_json
from gpt.configs.cli import JsonOutput, PresetOverrides, parse_over_preset
from gpt.configs.run_plan import MachineFacts
from gpt.configs.train_config import TrainConfig
from gpt.errors import UserError

if TYPE_CHECKING:
    from gpt.device_check import CheckResult
    from gpt.utils.distributed import DistContext

PASSED, FAILED, NOT_RUN = "passed", "FAILED", "not run"
WARMUP_STEPS = 3
"""Steps before host syncs are forbidden: memory is allocated and kernels are chosen with syncs."""
CHECKED_STEPS = 2
"""Steps in which a host sync is an error."""


class SelftestCommand(JsonOutput, PresetOverrides):
    """Check a device against the CPU in float32, in the shapes of a preset, and measure its training step.

    Forward pass, gradients, an optimizer step, and 20 steps are compared. On CUDA, a host sync in the training step is
    an error. A small run is killed and resumed, and compared bit by bit. The report is meant for an issue: it names
    versions and hardware, and no file.
    """

    kills: int = Field(3, ge=0, le=1000)
    """Times that a small run is killed and resumed; 0 leaves this out."""
    steps: int = Field(5, ge=1, le=1_000_000)
    """Steps to measure, twice."""


@dataclass(frozen=True)
class Check:
    """One line of the report."""

    name: str
    state: str
    """passed, FAILED or not run."""
    detail: str
    seconds: float


def run(argv: Sequence[str]) -> int:
    """Check, measure and print; return 1 if a check failed."""
    command = parse_over_preset(SelftestCommand, argv, verb="selftest")
    from gpt.machine.environment import describe_environment
    from gpt.machine.hardware import find_device
    from gpt.run import open_machine
    from gpt.utils.launch import world_size

    if world_size() > 1:
        raise UserError("gpt selftest checks one device; start it without torchrun")
    # `auto` is the device that is there, not the one that passed an earlier check.
    config = command.as_train_config().model_copy(update={"device": find_device(command.device)})
    dist, machine = open_machine(config)
    config = _shorten_step(config.on_device(machine.device))
    plan = plan_synthetic_run(config, machine, dist)
    config = config.model_copy(update={"micro_batch_size": plan.batch.micro_batch_size, "dtype": plan.dtype})
    console = build_console(stderr=command.as_json)
    environment = describe_environment(machine.runtime)
    del environment["command"]  # it may name the user's folders
    console.write_rows(_format_heading(machine, environment))
    checks = []
    for check in _check(command, config, machine, dist):
        checks.append(check)
        console.write_text(f"{check.state:9}{check.name}: {check.detail} ({check.seconds:.1f} s)")
    figures = measure_step(config, machine, dist, command.steps)
    console.write_rows(format_rows(figures))
    n_failed = sum(check.state == FAILED for check in checks)
    console.write_text(f"{n_failed} of {len(checks)} checks failed" if n_failed else "this device passed every check")
    if command.as_json:
        report = {"passed": n_failed == 0, "checks": [asdict(check) for check in checks], "figures": figures}
        print_json(report | {"environment": environment})
    dist.close()
    return int(n_failed > 0)


def _format_heading(machine: MachineFacts, environment: Mapping[str, Any]) -> dict[str, str]:
    cuda = f", CUDA {environment['cuda']}, {environment['driver']}" if machine.device == "cuda" else ""
    return {
        "device": f"{machine.device_name} ({machine.device})",
        "torch": f"{environment['libraries']['torch']}{cuda}",
        "platform": f"{environment['platform']}, Python {environment['python']}",
    }


def _shorten_step(config: TrainConfig) -> TrainConfig:
    """Return `config` with steps of one micro-batch, unless its size depends on them."""
    if isinstance(config.micro_batch_size, str) or config.parallel.reproducible:
        return config
    return config.model_copy(update={"tokens_per_step": 0})


def _check(
    command: SelftestCommand, config: TrainConfig, machine: MachineFacts, dist: "DistContext"
) -> Iterator[Check]:
    """Yield each check when it is done."""
    from gpt.utils.helper import plural

    yield from _compare_with_cpu(config, dist)
    yield _time_check("host syncs of the training step", lambda: _find_host_sync(config, machine, dist))
    yield _time_check(
        f"bits after {plural(command.kills, 'kill')}", lambda: _verify_resume(command.kills, config, machine)
    )


def _compare_with_cpu(config: TrainConfig, dist: "DistContext") -> Iterator[Check]:
    """Yield the comparisons with the CPU, and remember for `--device auto` whether the device passed."""
    from gpt.device_check import check_device, compute_reference, find_record, remember, shrink_model

    model = shrink_model(config.model)
    reference = compute_reference(model, config.optimizer)
    results: list[CheckResult] = []
    began = time.perf_counter()
    for result in check_device(dist.device, config.dtype, reference):
        results.append(result)
        seconds, began = time.perf_counter() - began, time.perf_counter()
        state = PASSED if result.is_right else FAILED
        detail = f"error {result.error:.1e} at {result.detail}, at most {result.bound:g}"
        yield Check(result.name, state, detail, seconds)
    is_right = all(result.is_right for result in results)
    remember(find_record(dist.device, model, config.data.cache_dir), is_right=is_right)


def _time_check(name: str, check: Callable[[], tuple[str, str]]) -> Check:
    """Run a check that returns its state and its detail."""
    began = time.perf_counter()
    state, detail = check()
    return Check(name, state, detail, time.perf_counter() - began)


def _find_host_sync(config: TrainConfig, machine: MachineFacts, dist: "DistContext") -> tuple[str, str]:
    """Train a few steps in which torch raises an error where the host waits for the GPU."""
    import torch

    from gpt.training.step_timer import StepTimer
    from gpt.utils.helper import first_line, plural

    if dist.device.type != "cuda":
        return NOT_RUN, f"torch finds them on CUDA only, and this is {dist.device.type}"
    train_step = build_synthetic_step(config, plan_synthetic_run(config, machine, dist), dist, StepTimer(dist.device))
    with closing(train_step):
        for step in range(WARMUP_STEPS):
            train_step(step)
        torch.cuda.set_sync_debug_mode("error")
        try:
            for step in range(WARMUP_STEPS, WARMUP_STEPS + CHECKED_STEPS):
                train_step(step)
        except RuntimeError as error:
            return FAILED, first_line(error)
        finally:
            torch.cuda.set_sync_debug_mode("default")
    return PASSED, f"none in {plural(CHECKED_STEPS, 'step')}"


def _verify_resume(kills: int, config: TrainConfig, machine: MachineFacts) -> tuple[str, str]:
    """Kill and resume a small run on this device, in processes of their own."""
    if kills == 0 or sys.platform != "linux":
        return NOT_RUN, "--kills is 0" if kills == 0 else f"verify-resume needs Linux, and this is {sys.platform}"
    with tempfile.TemporaryDirectory() as folder:
        arguments = ["verify-resume", "debug", "--device", machine.device, "--kills", str(kills), "--json"]
        arguments += ["--run-dir", str(Path(folder) / "run"), "--data.cache-dir", str(config.data.cache_dir)]
        if machine.device != "cpu" or config.parallel.reproducible:
            arguments.append("--parallel.reproducible")
        done = subprocess.run([sys.executable, str(MAIN), *arguments], capture_output=True, text=True)
    try:
        verdict: dict[str, Any] = json.loads(done.stdout)
    except ValueError:
        return FAILED, (done.stderr.strip().splitlines() or [f"verify-resume ended with status {done.returncode}"])[-1]
    if not verdict["bit_exact"]:
        return FAILED, verdict.get("first_difference") or verdict["error"]
    return PASSED, f"0 differing bits in {verdict['losses']} losses and {verdict['tensors']} tensors"
