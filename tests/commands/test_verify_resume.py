from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from gpt.checkpoint.run_folder import RunFolder
from gpt.commands.verify_resume import run
from gpt.errors import UserError
from gpt.verification import kills
from gpt.verification.kills import KillRecord


@pytest.fixture
def flags(text_file: Path, cache_dir: Path, tmp_path: Path) -> list[str]:
    return [
        *("debug", "--data.source", str(text_file), "--data.cache-dir", str(cache_dir), "--device", "cpu"),
        *("--dtype", "float32", "--model.n-embd", "16", "--tokens-per-step", "256", "--sample.max-new-tokens", "4"),
        *("--run-dir", str(tmp_path / "runs/mine"), "--checkpoint.interval", "4", "--eval.interval", "6"),
    ]


def test_a_run_killed_again_and_again_differs_in_no_bit(
    flags: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run([*flags, "--checkpoint.interval", "12", "--kills", "6", "--kill-seed", "5"]) == 0
    said = capsys.readouterr().out
    assert "144 steps instead of 20: 2 checkpoints for each kill" in said
    assert "reference: 144 steps on 1 rank in " in said
    assert (
        said.count("steps lost\n") + said.count("step lost\n") >= 3
    )  # on a busy machine the end may come before the last
    assert "0 differing bits in 144 losses, 24 evaluations, 24 samples, and the last checkpoint's " in said
    assert list((tmp_path / "runs").iterdir()) == []


def test_a_flipped_bit_in_the_last_weights_is_told_and_the_runs_are_kept(
    flags: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    really = kills.kill_and_resume

    def sabotage(start: Any, folder: RunFolder, *arguments: Any) -> list[KillRecord]:
        file = RunFolder(folder.path.with_name("reference")).committed()[-1] / "model.safetensors"
        tensors = load_file(file)
        tensors["wpe.weight"].view(torch.int32)[7, 3] ^= 1
        save_file(tensors, file)
        return really(start, folder, *arguments)

    monkeypatch.setattr(kills, "kill_and_resume", sabotage)
    assert run([*flags, "--kills", "1", "--max-steps", "6"]) == 1
    said = capsys.readouterr().out
    assert "instead of" not in said  # a horizon that is given stands
    assert "first difference: step_00000006/model.safetensors: wpe.weight[7, 3]: " in said
    assert "values that differ: 1\n" in said
    folder = tmp_path / "runs/mine-verify-resume"
    assert f"both runs are in {folder}" in said
    assert {path.name for path in folder.iterdir()} >= {"reference", "resumed", "reference.log", "resumed.log"}
    with pytest.raises(UserError, match=f"{folder} is there already"):
        run(flags)


def test_another_seed_in_the_second_run_is_told_from_the_first_step_on(
    flags: list[str], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    really = kills.kill_and_resume

    def sabotage(start: Any, folder: RunFolder, *arguments: Any) -> list[KillRecord]:
        config = folder.path.with_name("config.json")
        config.write_text(config.read_text().replace('"seed": 1337', '"seed": 1338'))
        return really(start, folder, *arguments)

    monkeypatch.setattr(kills, "kill_and_resume", sabotage)
    assert run([*flags, "--kills", "1", "--max-steps", "6"]) == 1
    assert "first difference: metrics.jsonl, step 1: " in capsys.readouterr().out


def test_a_run_that_cannot_go_on_is_told(
    flags: list[str], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    really = kills.kill_and_resume

    def sabotage(start: Callable[[], Any], folder: RunFolder, *arguments: Any) -> list[KillRecord]:
        folder.path.mkdir()
        folder.metrics.touch()
        return really(start, folder, *arguments)

    monkeypatch.setattr(kills, "kill_and_resume", sabotage)
    assert run([*flags, "--kills", "1", "--max-steps", "2"]) == 1
    said = capsys.readouterr().out
    assert "the killed run does not go on: the run exited with status 2 although nothing killed it" in said
    assert "holds a run without its config.json" in said


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (("--kils", "3"), "unknown flag --kils; did you mean --kills?"),
        (("--kills", "0"), "--kills 0: must be at least 1"),
        (("--data.source", "/no/such/text"), "--data.source /no/such/text: no such file or folder"),
        (("--tokens-per-step", "1000"), "--tokens-per-step 1000 is not divisible"),
    ],
)
def test_mistakes_are_one_line_and_leave_nothing(
    wrong: tuple[str, str], message: str, flags: list[str], tmp_path: Path
) -> None:
    with pytest.raises(UserError, match=message) as told:
        run([*flags, *wrong])
    assert "\n" not in str(told.value)
    assert not (tmp_path / "runs").exists() or list((tmp_path / "runs").iterdir()) == []
