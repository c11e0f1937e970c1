"""Runs that are killed at seeded points and resumed, beside the same run left in peace."""

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
def test_kills_at_every_kind_of_place_change_no_bit(
    ranks: int, kills: int, flags: list[str], cache_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The text is short: an epoch takes some twenty steps."""
    (tmp_path / "text.txt").write_text(make_text(1000))
    place = ["--data.source", str(tmp_path / "text.txt"), "--data.cache-dir", str(cache_dir)]
    asked = ["--run-dir", str(tmp_path / "run"), "--ranks", str(ranks), "--kills", str(kills)]
    assert run([*FLAGS, *place, *asked, *flags]) == 0, capsys.readouterr().out
    said = capsys.readouterr().out
    assert f"kill {kills * 2 // 3}: " in said  # so short a run may come to its end before the last ones
    assert "at an epoch's edge" in said
    assert "0 differing bits in " in said
