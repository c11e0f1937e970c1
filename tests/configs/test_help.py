import re

import pytest

from gpt.commands.bench import BenchCommand
from gpt.commands.train import TrainCommand, parse_train
from gpt.configs.cli import parse_over_preset
from gpt.configs.fields import list_flags
from gpt.configs.help import COMMON_FIELDS
from gpt.configs.presets import PRESETS
from gpt.configs.train_config import TrainConfig


def show(capsys: pytest.CaptureFixture[str], *argv: str) -> str:
    with pytest.raises(SystemExit) as stop:
        parse_train(argv)
    assert stop.value.code == 0
    return capsys.readouterr().out


def test_short_help_shows_the_preset_and_twenty_common_flags_in_groups(capsys: pytest.CaptureFixture[str]) -> None:
    shown = show(capsys, "--help")
    assert shown.startswith("usage: gpt train [PRESET] [--flags]\n")
    assert all(preset in shown for preset in PRESETS)
    flags = re.findall(r"^  (--[\w.-]+)", shown, flags=re.MULTILINE)
    own = [flag for flag in list_flags(TrainCommand) if flag not in list_flags(TrainConfig) and "--no-" not in flag]
    assert {"--config", "--json", "--dry-run"} <= set(own)
    assert flags[: len(own)] == own
    assert len(flags[len(own) :]) == 20
    assert [heading for heading in COMMON_FIELDS if f"\n{heading}:\n" not in shown] == []
    assert "gpt train --help-all lists all" in shown
    assert shown == show(capsys, "-h")


def test_short_help_shows_the_defaults_of_the_preset(capsys: pytest.CaptureFixture[str]) -> None:
    assert "(default: runs/quickstart)" in show(capsys, "--help")
    shown = show(capsys, "debug", "--help")
    assert "(default: runs/debug)" in shown
    assert "(default: byte)" in shown


def test_short_help_of_other_commands_has_their_own_flags(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        parse_over_preset(BenchCommand, ["--help"], verb="bench")
    shown = capsys.readouterr().out
    assert shown.startswith("usage: gpt bench [PRESET] [--flags]\n")
    assert "--steps INT" in shown


def test_short_help_fits_the_terminal(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "60")
    assert max(map(len, show(capsys, "--help").splitlines())) <= 80
    assert max(len(line) for line in show(capsys, "--help").splitlines() if line.startswith("        ")) <= 60
