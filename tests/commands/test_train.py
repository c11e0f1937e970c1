"""Dry runs: the memory and the time of a run before it starts."""

import json
from pathlib import Path

import pytest

from gpt.commands.train import run
from gpt.errors import UserError


@pytest.fixture
def flags(text_file: Path, cache_dir: Path, tmp_path: Path) -> list[str]:
    return [
        *("debug", "--run-dir", str(tmp_path / "run"), "--data.source", str(text_file), "--dry-run"),
        *("--data.cache-dir", str(cache_dir), "--max-steps", "4", "--device", "cpu"),
    ]


def read_plan(flags: list[str], capsys: pytest.CaptureFixture[str]) -> dict[str, object]:
    assert run([*flags, "--json"]) == 0
    plan: dict[str, object] = json.loads(capsys.readouterr().out)
    return plan


def test_dry_run_compares_the_memory_with_what_is_free(flags: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert run(flags) == 0
    shown = capsys.readouterr().out
    assert "memory         about " in shown
    assert "optimizer " in shown
    assert "\ntime  " not in shown
    memory = read_plan(flags, capsys)["memory"]
    assert isinstance(memory, dict)
    parts = ("weights", "gradients", "optimizer", "activations", "checkpoint")
    assert memory["total"] == sum(memory[part] for part in parts)
    assert memory["available"] is None or memory["available"] > 0


def test_probe_estimates_the_time_and_leaves_no_run(
    flags: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run([*flags, "--probe"]) == 0
    assert " for 4 steps, without evaluation and saving: " in capsys.readouterr().out
    probe = read_plan([*flags, "--probe"], capsys)["probe"]
    assert isinstance(probe, dict)
    assert probe["seconds"] == pytest.approx(4 * probe["seconds_per_step"])
    assert probe["tokens_per_second"] > 0
    assert not (tmp_path / "run").exists()


def test_probe_needs_a_dry_run(flags: list[str]) -> None:
    flags.remove("--dry-run")
    with pytest.raises(UserError, match="--probe needs --dry-run"):
        run([*flags, "--probe"])
