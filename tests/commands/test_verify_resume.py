import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from gpt.checkpoint.run_folder import RunFolder
from gpt.commands.verify_resume import run, suggest_flag
from gpt.configs.parallel_config import ParallelConfig
from gpt.configs.train_config import TrainConfig
from gpt.errors import UserError
from gpt.verification import kills
from gpt.verification.kills import KillRecord
from tests.checkpoint.test_store import trained_state, write_checkpoint


@pytest.fixture
def flags(text_file: Path, cache_dir: Path, tmp_path: Path) -> list[str]:
    return [
        *("debug", "--data.source", str(text_file), "--data.cache-dir", str(cache_dir), "--device", "cpu"),
        *("--dtype", "float32", "--model.n-embd", "16", "--tokens-per-step", "256", "--sample.max-new-tokens", "4"),
        *("--run-dir", str(tmp_path / "runs/mine"), "--checkpoint.interval", "4", "--eval.interval", "6"),
    ]


def test_run_killed_and_resumed_repeatedly_is_bit_exact(
    flags: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run([*flags, "--checkpoint.interval", "12", "--kills", "6", "--kill-seed", "5"]) == 0
    output = capsys.readouterr().out
    assert "144 steps instead of 20: 2 checkpoints for each kill" in output
    assert "reference: 144 steps on 1 rank in " in output
    n_kills = output.count("steps lost\n") + output.count("step lost\n")
    assert n_kills >= 3  # on a busy machine the run may finish before the last kills
    assert "0 differing bits in 144 losses, 24 evaluations, 24 samples, and the last checkpoint's " in output
    assert list((tmp_path / "runs").iterdir()) == []


def test_flipped_bit_in_the_last_weights_is_reported_and_both_runs_are_kept(
    flags: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    original = kills.kill_and_resume

    def sabotage(start: Any, folder: RunFolder, *arguments: Any) -> list[KillRecord]:
        file = RunFolder(folder.path.with_name("reference")).list_checkpoints()[-1] / "model.safetensors"
        tensors = load_file(file)
        tensors["wpe.weight"].view(torch.int32)[7, 3] ^= 1
        save_file(tensors, file)
        return original(start, folder, *arguments)

    monkeypatch.setattr(kills, "kill_and_resume", sabotage)
    assert run([*flags, "--kills", "1", "--max-steps", "6"]) == 1
    output = capsys.readouterr().out
    assert "instead of" not in output  # a length that the user sets is not changed
    assert "first difference: step_00000006/model.safetensors: wpe.weight[7, 3]: " in output
    assert "values that differ: 1\n" in output
    assert "--parallel.reproducible" not in output  # a CPU is bit-exact without it
    folder = tmp_path / "runs/mine-verify-resume"
    assert f"both runs are in {folder}" in output
    assert {path.name for path in folder.iterdir()} >= {"reference", "resumed", "reference.log", "resumed.log"}
    with pytest.raises(UserError, match=f"{folder} exists already"):
        run(flags)


def test_flag_for_gpus_is_named_where_a_run_on_one_differs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    on_gpu, on_cpu = RunFolder(tmp_path / "gpu"), RunFolder(tmp_path / "cpu")
    write_checkpoint(on_cpu.checkpoint_path(1), trained_state(), "{}")
    monkeypatch.setattr("gpt.checkpoint.manifest.describe_gpu", lambda: {"gpu": "NVIDIA H100, capability 9.0"})
    write_checkpoint(on_gpu.checkpoint_path(1), trained_state(), "{}")
    plain, reproducible = TrainConfig(), TrainConfig(parallel=ParallelConfig(reproducible=True))
    assert "; with --parallel.reproducible they add in one order" in suggest_flag(plain, on_gpu)
    assert suggest_flag(reproducible, on_gpu) == suggest_flag(plain, on_cpu) == ""


def test_another_seed_in_the_resumed_run_differs_from_the_first_step_on(
    flags: list[str], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    original = kills.kill_and_resume

    def sabotage(start: Any, folder: RunFolder, *arguments: Any) -> list[KillRecord]:
        config = folder.path.with_name("config.json")
        config.write_text(config.read_text().replace('"seed": 1337', '"seed": 1338'))
        return original(start, folder, *arguments)

    monkeypatch.setattr(kills, "kill_and_resume", sabotage)
    assert run([*flags, "--kills", "1", "--max-steps", "6", "--json"]) == 1
    output, progress = capsys.readouterr()
    verdict = json.loads(output)
    assert not verdict["bit_exact"]
    assert verdict["first_difference"].startswith("metrics.jsonl, step 1: ")
    assert f"first difference: {verdict['first_difference']}\n" in progress
    assert f"values that differ: {verdict['differing_values']:,}\n" in progress
    assert f"both runs are in {verdict['folder']}\n" in progress


def test_json_equals_the_plain_output(flags: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert run([*flags, "--kills", "2", "--max-steps", "24", "--json"]) == 0
    output, progress = capsys.readouterr()
    verdict = json.loads(output)
    assert (verdict["bit_exact"], verdict["error"], verdict["folder"], verdict["ranks"]) == (True, None, None, 1)
    assert f"reference: {verdict['steps']} steps on 1 rank in " in progress
    assert f"most steps lost by a kill: {verdict['max_lost_steps']}; " in progress
    for number, kill in enumerate(verdict["kills"], 1):
        assert (
            f"kill {number}: {kill['phase']} by {kill['signal']}, after step {kill['step']}; {kill['lost_steps']} step"
            in progress
        )
    assert (
        f"0 differing bits in {verdict['losses']} losses, {verdict['evaluations']} evaluations, {verdict['samples']} "
        f"samples, and the last checkpoint's {verdict['tensors']} tensors"
    ) in progress
    assert (verdict["differing_values"], verdict["first_difference"]) == (0, None)


def test_run_that_cannot_be_resumed_is_reported(
    flags: list[str], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    original = kills.kill_and_resume

    def sabotage(start: Callable[[], Any], folder: RunFolder, *arguments: Any) -> list[KillRecord]:
        folder.path.mkdir()
        folder.metrics.touch()
        return original(start, folder, *arguments)

    monkeypatch.setattr(kills, "kill_and_resume", sabotage)
    assert run([*flags, "--kills", "1", "--max-steps", "2"]) == 1
    output = capsys.readouterr().out
    assert "the killed run cannot be resumed: the run exited with status 2 although nothing killed it" in output
    assert "holds a run without its config.json" in output


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (("--kils", "3"), "unknown flag --kils; did you mean --kills?"),
        (("--kills", "0"), "--kills 0: must be at least 1"),
        (("--data.source", "/no/such/text"), "--data.source /no/such/text: no such file or folder"),
        (("--tokens-per-step", "1000"), "--tokens-per-step 1000 is not divisible"),
    ],
)
def test_mistake_is_one_line_and_leaves_no_files(
    wrong: tuple[str, str], message: str, flags: list[str], tmp_path: Path
) -> None:
    with pytest.raises(UserError, match=message) as error:
        run([*flags, *wrong])
    assert "\n" not in str(error.value)
    assert not (tmp_path / "runs").exists() or list((tmp_path / "runs").iterdir()) == []
