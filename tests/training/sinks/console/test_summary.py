import json
import re
from dataclasses import replace
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
from rich.cells import cell_len

from gpt.checkpoint.manifest import CHECKPOINT_MANIFEST
from gpt.checkpoint.run_folder import RunFolder
from gpt.training.sinks.console.summary import Ending, print_summary
from gpt.training.step_timer import Part
from gpt.utils.terminal import RunConsole
from tests.training.example_events import PLAN
from tests.utils.screen import Screen
from tests.utils.test_terminal import WIDTHS

pytestmark = pytest.mark.usefixtures("capable_terminal")

PARTS: dict[Part, float] = {
    "data": 0.1,
    "forward": 28.4,
    "backward": 28.0,
    "optimizer": 7.0,
    "evaluation": 3.5,
    "sampling": 0.6,
    "saving": 1.4,
}
ENDING = Ending(20, "finished", 70.0, PARTS)


@pytest.fixture
def folder(tmp_path: Path) -> RunFolder:
    """Write a run's folder with its metrics."""
    run = RunFolder(tmp_path / "my run")
    (run.path / "checkpoints" / "step_00000020").mkdir(parents=True)
    (run.path / "checkpoints" / "step_00000020" / CHECKPOINT_MANIFEST).write_text("{}")
    records: list[dict[str, Any]] = [{"step": step, "train/loss": 9.0 - step / 4} for step in range(1, 21)]
    records.insert(10, {"step": 10, "val/loss": 4.5, "val/perplexity": 90.0171, "val/bpb": 1.9})
    records += [{"step": 15, "val/loss": None}, {"step": 20, "val/loss": 4.75, "val/perplexity": 115.58, "val/bpb": 2}]
    run.metrics.write_text("".join(json.dumps(record) + "\n" for record in records) + '{"step": 21, "tr')
    run.samples.write_text("")
    return run


def in_pipe(folder: RunFolder, ending: Ending = ENDING) -> str:
    out = StringIO()
    print_summary(RunConsole(file=out), ending, PLAN, folder)
    return out.getvalue()


def test_summary_shows_best_validation_time_files_and_commands(folder: RunFolder) -> None:
    lines = in_pipe(folder).splitlines()
    path = folder.path
    assert lines[0] == "finished at step 20 after 0:01:10"
    assert lines[1] == "train/loss, and o val/loss"
    assert lines[-8:] == [
        "best validation  val/loss 4.5000, val/perplexity 90.02, val/bpb 1.9000 at step 10 "
        "(xz -9e on the same files: 1.7500)",
        "time             forward 28.4 s (41%), backward 28.0 s (40%), optimizer 7.0 s (10%), evaluation 3.5 s (5%), "
        "sampling 600 ms (1%), saving 1.4 s (2%), other 1.0 s (1%)",
        f"run folder       {path}",
        f"checkpoint       {path}/checkpoints/step_00000020",
        f"metrics          {path}/metrics.jsonl",
        f"samples          {path}/samples.jsonl",
        f"next             gpt sample '{path}' --prompt TEXT",
        f"                 gpt verify '{path}'",
    ]


@pytest.mark.parametrize("width", WIDTHS)
def test_summary_fits_every_terminal(width: int, folder: RunFolder) -> None:
    screen = Screen(width)
    print_summary(RunConsole(file=screen, width=width), ENDING, PLAN, folder)
    for line in screen.lines:
        assert cell_len(line) <= width or str(folder.path) in line
        assert line == line.rstrip()
        assert "…" not in line
    assert any(re.search("[⠁-⣿]", line) for line in screen.lines)
    words = in_pipe(folder).split()
    assert " ".join(screen.lines).split()[-40:] == words[-40:]


@pytest.mark.parametrize(("name", "value"), [("TERM", "dumb"), ("PYTHONIOENCODING", "latin-1")])
def test_curve_is_ascii_where_nothing_else_can_be_shown(
    name: str, value: str, folder: RunFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Latin(Screen):
        encoding = "latin-1"  # type: ignore[assignment]

    monkeypatch.setenv(name, value)
    screen = Latin(80) if value == "latin-1" else Screen(80)
    print_summary(RunConsole(file=screen, width=80), ENDING, PLAN, folder)
    assert all(line.isascii() for line in screen.lines)
    assert any("|*" in line for line in screen.lines)


def test_summary_of_a_run_without_metrics(tmp_path: Path) -> None:
    assert in_pipe(RunFolder(tmp_path), replace(ENDING, parts={})) == (
        f"finished at step 20 after 0:01:10\nrun folder  {tmp_path}\n"
        f"next        gpt sample {tmp_path} --prompt TEXT\n            gpt verify {tmp_path}\n"
    )


def test_path_with_control_characters_is_harmless(tmp_path: Path) -> None:
    run = RunFolder(tmp_path / "a\x1b[2J\n[red]:bug:")
    run.path.mkdir()
    text = in_pipe(run)
    assert "\x1b" not in text
    assert r"a\x1b[2J\n[red]:bug:" in text
