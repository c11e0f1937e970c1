import json
from pathlib import Path

import pytest

from gpt.commands import bench
from gpt.commands.bench import SpeedrunCommand, SpeedrunText, run
from gpt.errors import UserError

FLAGS = "--steps 2 --device cpu --model.n-layer 1 --micro-batch-size 2 --tokens-per-step 256".split()


def measured(tmp_path: Path, *argv: str) -> dict[str, object]:
    figures = tmp_path / "figures.json"
    status = run([*argv, *FLAGS, "--data.cache-dir", str(tmp_path / "cache"), "--json", str(figures)])
    assert status == 0
    found: dict[str, object] = json.loads(figures.read_text())
    return found


@pytest.mark.parametrize(
    "flags", [[], ["--data.document-mask"], "--dtype float16 --data.source a b --data.weights 1 2".split()]
)
def test_a_step_is_measured(
    flags: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("gpt.machine.peak_flops.SECONDS_PER_SHAPE", 0)
    figures = measured(tmp_path, "debug", *flags)
    shown = capsys.readouterr().out
    for name in ("tokens/s", "ms per step", "data", "forward", "backward", "optimizer", "peak memory", "MFU"):
        assert name in shown
    assert figures["tokens_per_step"] == 256
    phases = figures["milliseconds"]
    assert isinstance(phases, dict)
    assert list(phases) == ["data", "forward", "backward", "optimizer"]
    assert all(milliseconds > 0 for milliseconds in phases.values())
    rate, flops = figures["tokens_per_second"], figures["flops_per_token"]
    assert isinstance(rate, float)
    assert isinstance(flops, int)
    assert figures["mfu"] == pytest.approx(rate * flops / figures["peak_flops_per_second"])  # type: ignore[operator]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["cache", "figures.json"]  # no run was made


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("debg", "unknown verb or preset 'debg'; did you mean debug?"),
        ("--stps 3", "unknown flag --stps; did you mean --steps?"),
        ("--steps 0", "--steps 0: must be at least 1"),
        ("--jsn x", "unknown flag --jsn; did you mean --json?"),
        ("--steps 3 debug", "a preset comes first: gpt bench debug"),
        ("debug --tokens-per-step 500", "nearest: 256 or 512"),
        ("speedrun --max-steps 3", "unknown flag --max-steps"),
    ],
)
def test_mistakes_are_one_line(line: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        run(line.split())


def test_the_speedrun_is_a_process_of_its_own(
    text_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    command = SpeedrunCommand(data=SpeedrunText(source=(str(text_file),)), json=tmp_path / "figures.json")
    assert bench._bench_speedrun(command, "--max-steps", "1", "--eval.batches", "1", "--device", "cpu") == 1
    figures = json.loads((tmp_path / "figures.json").read_text())
    assert not figures["reached"]
    assert figures["val/loss"] > bench.SPEEDRUN_LOSS
    shown = capsys.readouterr().out
    assert f"{figures['seconds']:.1f}, from the start" in shown
    assert "no: at most 1.88" in shown


def test_a_text_that_is_not_there_is_told_by_the_run(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert run(["speedrun", "--data.source", str(tmp_path / "none.txt")]) == 2
    assert "none.txt: no such file" in capfd.readouterr().err
