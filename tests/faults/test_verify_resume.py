"""`gpt verify-resume`: runs that are killed at seeded steps and resumed, compared with their reference run."""

import json
from pathlib import Path

import pytest

from gpt.commands.verify_resume import run
from tests.conftest import make_text

pytestmark = pytest.mark.faults

FLAGS = [
    *("debug", "--device", "cpu", "--dtype", "float32", "--model.n-embd", "16", "--tokens-per-step", "256"),
    *("--sample.max-new-tokens", "4", "--micro-batch-size", "2", "--model.dropout", "0.1"),
    *("--checkpoint.interval", "5", "--eval.interval", "7"),
]


@pytest.mark.parametrize(
    ("ranks", "kills", "flags"),
    [
        (1, 12, ["--checkpoint.keep-best"]),
        (1, 6, ["--checkpoint.no-asynchronous", "--optimizer.name", "muon"]),
        (2, 3, ["--max-steps", "80"]),
    ],
)
def test_run_killed_in_every_phase_and_resumed_is_bit_exact(
    ranks: int, kills: int, flags: list[str], cache_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "text.txt").write_text(make_text(1000))  # so short that an epoch takes about 20 steps
    data = ["--data.source", str(tmp_path / "text.txt"), "--data.cache-dir", str(cache_dir)]
    command = ["--run-dir", str(tmp_path / "run"), "--ranks", str(ranks), "--kills", str(kills)]
    assert run([*FLAGS, *data, *command, *flags]) == 0, capsys.readouterr().out
    output = capsys.readouterr().out
    assert f"kill {kills * 2 // 3}: " in output  # such a short run may finish before the last kills
    assert "at an epoch boundary" in output
    assert "0 differing bits in " in output


@pytest.mark.parametrize(("ranks", "kills", "seed"), [(1, 9, 0), (1, 9, 1), (2, 4, 0)])
def test_run_with_spikes_stopped_and_killed_is_bit_exact(
    ranks: int, kills: int, seed: int, cache_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pieces = [make_text(400, index) + "0123456789ABCDEFGHIJ" * 5 for index in range(6)]  # what has a high loss
    (tmp_path / "text.txt").write_text("".join(pieces))
    data = ["--data.source", str(tmp_path / "text.txt"), "--data.cache-dir", str(cache_dir)]
    command = ["--run-dir", str(tmp_path / "run"), "--ranks", str(ranks), "--kills", str(kills)]
    spikes = ["--spike.rollback", "--spike.window", "16", "--spike.threshold", "2", "--spike.least-rise", "0.02"]
    limits = ["--spike.max-rollbacks", "100000", "--max-steps", "90", "--seed", str(seed)]
    assert run([*FLAGS, *data, *command, *spikes, *limits, "--kill-seed", str(seed), "--json"]) == 0, (
        capsys.readouterr()
    )
    verdict = json.loads(capsys.readouterr().out)
    assert verdict["bit_exact"] and verdict["differing_values"] == 0
    assert verdict["rollbacks"] >= 3, verdict
    assert {"SIGTERM", "SIGINT"} & {kill["signal"] for kill in verdict["kills"]}
