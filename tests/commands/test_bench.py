import json
import re
from pathlib import Path

import pytest

from gpt.commands import bench
from gpt.commands.bench import SpeedrunCommand, SpeedrunText, run
from gpt.errors import UserError

FLAGS = "--steps 2 --device cpu --model.n-layer 1 --micro-batch-size 2 --tokens-per-step 256".split()


@pytest.mark.parametrize(
    "flags", [[], ["--data.document-mask"], "--dtype float16 --data.source a b --data.weights 1 2".split()]
)
def test_step_is_measured_and_printed_as_a_table_or_as_json(
    flags: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("gpt.machine.peak_flops.SECONDS_PER_SHAPE", 0)
    command = ["debug", *flags, *FLAGS, "--data.cache-dir", str(tmp_path / "cache")]
    assert run(command) == 0
    output = capsys.readouterr().out
    for name in ("tokens/s", "ms per step", "data", "forward", "backward", "optimizer", "peak memory", "MFU"):
        assert name in output
    assert run([*command, "--json"]) == 0
    figures = json.loads(capsys.readouterr().out)
    assert figures["tokens_per_step"] == 256
    phases = figures["milliseconds"]
    assert list(phases) == ["data", "forward", "backward", "optimizer"]
    assert all(milliseconds > 0 for milliseconds in phases.values())
    rate, flops = figures["tokens_per_second"], figures["flops_per_token"]
    assert isinstance(rate, float)
    assert isinstance(flops, int)
    assert figures["mfu"] == pytest.approx(rate * flops / figures["peak_flops_per_second"])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["cache"]  # no run was made


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
def test_mistake_is_reported_in_one_line(line: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        run(line.split())


def test_speedrun_is_measured_in_a_process_of_its_own(
    text_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    data, flags = SpeedrunText(source=(str(text_file),)), "--max-steps 1 --eval.batches 1 --device cpu".split()
    assert bench._bench_speedrun(SpeedrunCommand(data=data, json=True), *flags) == 1
    figures = json.loads(capsys.readouterr().out)
    assert not figures["reached"]
    assert figures["val/loss"] > bench.SPEEDRUN_LOSS
    assert 0 < figures["seconds"] < 100
    assert bench._bench_speedrun(SpeedrunCommand(data=data), *flags) == 1
    output = capsys.readouterr().out
    assert re.search(r"seconds +\d+\.\d, from the start of the process", output)
    assert "no: the target is at most 1.88" in output


def test_missing_text_is_reported_by_the_run(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert run(["speedrun", "--data.source", str(tmp_path / "none.txt")]) == 2
    assert "none.txt: no such file" in capfd.readouterr().err
