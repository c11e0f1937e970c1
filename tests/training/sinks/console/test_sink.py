"""A run on terminals of every width, and where there is none."""

import re
from dataclasses import replace
from io import StringIO
from pathlib import Path

import pytest
import torch
from rich.cells import cell_len

from gpt.checkpoint.run_folder import RunFolder
from gpt.training.events import (
    CheckpointSaved,
    EvalEnd,
    Event,
    MetricsReady,
    RolledBack,
    SpikeSeen,
    StepEnd,
    TextSampled,
    TrainEnd,
    TrainStart,
)
from gpt.training.sinks.console.sink import ConsoleSink
from gpt.training.step_timer import StepTimer
from gpt.utils.terminal import RunConsole
from tests.training.example_events import EVENTS, METRICS, PLAN, TROUBLE
from tests.utils.screen import Screen
from tests.utils.test_terminal import WIDTHS

pytestmark = pytest.mark.usefixtures("capable_terminal")

SAMPLE = "def f(x):\n\tif x:  # :smile: [bold]\n" + "x" * 300 + "  \n\n\x1b[2J\x1b]0;title\x07\r end"
LONG_PATH = "/runs/" + "p" * 230 + "/checkpoints/step_00000010"
STORY: list[Event] = [
    TrainStart(0, PLAN, LONG_PATH),
    MetricsReady(1, METRICS, (9.0,)),
    StepEnd(1, 4096),
    MetricsReady(10, METRICS, (2.6, 2.5)),
    EvalEnd(10, "val", {"val/loss": 2.0, "val/perplexity": 7.389, "val/bpb": 1.5, "val/loss/[red]:bug:": 2.0}),
    TextSampled(10, "prompt ", SAMPLE),
    StepEnd(10, 40960),
    CheckpointSaved(10, LONG_PATH),
    SpikeSeen(11, 25.0, 2.5, 12.0),
    RolledBack(11, 10, "the loss of step 11 was 25.0 at\na [file]"),
    MetricsReady(20, METRICS, (2.6, 2.5)),
    StepEnd(20, 81920),
    TrainEnd(20, "finished"),
]


def show(file: Screen | StringIO, events: list[Event], folder: Path = Path("runs/a")) -> None:
    width = {"width": file.columns} if isinstance(file, Screen) else {}
    sink = ConsoleSink(RunConsole(file=file, **width), PLAN, RunFolder(folder))
    for event in events:
        if isinstance(event, sink.events):
            sink.write(event)
            sink._line.paint()
    sink.close(None)


def on_screen(width: int, events: list[Event] = STORY) -> Screen:
    screen = Screen(width)
    show(screen, events)
    return screen


def in_pipe(events: list[Event] = STORY) -> str:
    out = StringIO()
    show(out, events)
    return out.getvalue()


def test_pipe_gets_one_line_per_report() -> None:
    lines = in_pipe(EVENTS).splitlines()
    assert lines[:4] == [
        "resuming from runs/a/checkpoints/step_00000005",
        "step 10/20  loss 2.5000  lr 1.00e-03  2.05 k tokens/s  MFU 45.6%  ETA 0:00:20",
        "step 10: val/loss 2.0000, val/perplexity 7.39, val/bpb 1.5000",
        "--- sample of step 10 ------------------",
    ]
    assert "step 10: saved runs/a/checkpoints/step_00000010" in lines
    assert "finished at step 20 after 0:00:00" in lines
    assert lines[-2:] == ["next  gpt sample runs/a --prompt TEXT", "      gpt verify runs/a"]


def test_stopped_run_is_resumed_by_the_same_command() -> None:
    assert "next  the same command resumes the run\n" in in_pipe([TrainEnd(10, "SIGINT")])


@pytest.mark.parametrize("width", WIDTHS)
def test_every_line_fits_the_terminal_and_nothing_is_cut_or_padded(width: int) -> None:
    lines = on_screen(width).lines
    paths = [line for line in lines if "/runs/ppp" in line]
    sample_lines = SAMPLE.encode("unicode_escape").decode().replace("\\t", "\t").split("\\n")
    assert len(paths) == 2
    for line in lines:
        assert cell_len(line) <= width or line in paths or "x" * 300 in line
        assert "…" not in line
        assert line == line.rstrip() or line in sample_lines
    text = " ".join(" ".join(lines).split())
    for part in (
        f"resuming from {LONG_PATH}",
        "step 1/20 mean loss 9.0000 lr 1.00e-03 2.05 k tokens/s MFU 45.6%",
        "step 10: val/loss 2.0000, val/perplexity 7.39, val/bpb 1.5000, val/loss/[red]:bug: 2.0000",
        f"step 10: saved {LONG_PATH}",
        "step 11: loss 25.0000 is a spike, 12.0 deviations above the median 2.5000",
        r"step 11: rolled back to step 10: the loss of step 11 was 25.0 at\na [file]",
        "finished at step 20 after 0:00:00",
    ):
        assert part in text


@pytest.mark.parametrize("width", WIDTHS)
def test_sample_keeps_its_lines_and_loses_its_control_characters(width: int) -> None:
    expected = "prompt def f(x):\n\tif x:  # :smile: [bold]\n" + "x" * 300 + "  \n\n\\x1b[2J\\x1b]0;title\\x07\\r end\n"
    assert expected in in_pipe()
    assert expected in "\n".join(on_screen(width).lines)


@pytest.mark.parametrize("width", WIDTHS)
def test_bar_is_painted_and_gone_at_the_end(width: int) -> None:
    screen = on_screen(width)
    assert re.search("step 10/20  ━+─+  0:00:00 elapsed, 0:00:00 left", re.sub(r"\x1b\[[0-9;]*m", "", screen.raw))
    assert not any("━" in line for line in screen.lines)


def test_resize_between_updates_leaves_no_remains() -> None:
    screen = Screen(200)

    class Resized(RunConsole):
        @property
        def width(self) -> int:
            return screen.columns

    sink = ConsoleSink(Resized(file=screen), PLAN, RunFolder(Path("runs/a")))
    for width, event in zip([200, 120, 60, 80, 33, 61] * 3, STORY, strict=False):
        screen.resize(width)
        sink.write(event)
        sink._line.paint()
    sink.close(None)
    assert not any("elapsed" in line for line in screen.lines)
    assert any("mean loss 9.0000" in line for line in screen.lines)


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize(("name", "value"), [("TERM", "dumb"), ("CI", "true")])
def test_dumb_terminal_and_ci_get_no_escape_sequences(
    width: int, name: str, value: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(name, value)
    screen = on_screen(width)
    assert "\x1b" not in screen.raw
    assert "\r" not in screen.raw
    assert any("ETA" in line for line in screen.lines)
    assert all(cell_len(line) <= width for line in screen.lines if "xxx" not in line and "ppp" not in line)


def test_no_color_moves_the_cursor_but_styles_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    assert "m" in on_screen(80).styles
    monkeypatch.setenv("NO_COLOR", "1")
    assert on_screen(80).styles == ["K"]


def test_pipe_gets_no_escape_sequences_whatever_the_environment_says(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("FORCE_COLOR", "TTY_COMPATIBLE", "TTY_INTERACTIVE"):
        monkeypatch.setenv(name, "1")
    assert "\x1b" not in in_pipe()
    assert "elapsed" not in in_pipe()


def test_terminal_keeps_about_twenty_reports() -> None:
    plan = replace(PLAN, max_steps=1000)
    screen = Screen(120)
    sink = ConsoleSink(RunConsole(file=screen, width=120), plan, RunFolder(Path("runs/a")))
    sink.write(TrainStart(0, plan, None))
    for step in (1, *range(10, 1001, 10)):
        sink.write(MetricsReady(step, METRICS, (float(step),) * (1 if step == 1 else 10)))
    sink.close(None)
    logged = [int(match[1]) for line in screen.lines if (match := re.match(r"step (\d+)/1000  mean loss", line))]
    assert logged == [1, *range(50, 1001, 50)]
    assert "step 100/1000  mean loss 80.0000" in "\n".join(screen.lines)  # of the reports of steps 60 to 100


def test_skipped_updates_spikes_and_rollbacks_are_lines() -> None:
    lines = in_pipe(TROUBLE).splitlines()
    for line in (
        "step 11, 12: 2 updates skipped: a NaN or inf in the loss or gradient",
        "step 12: loss 25.0000 is a spike, inf deviations above the median 2.5000",
        "step 12: rolled back to step 10: the loss of step 12 was 25.0",
    ):
        assert line in lines


def test_mfu_of_a_tiny_model_is_not_zero() -> None:
    tiny = MetricsReady(10, METRICS | {"mfu": 0.00012}, (2.5,))
    assert "MFU 0.01%" in in_pipe([tiny])
    assert "MFU" not in in_pipe([MetricsReady(10, METRICS | {"mfu": 0.0}, (2.5,))])


def test_mfu_of_a_known_gpu_is_also_of_its_data_sheet() -> None:
    report = MetricsReady(10, METRICS | {"mfu": 0.42, "mfu_data_sheet": 0.34}, (2.5,))
    assert "MFU 42.0% (34.0% of data sheet)" in in_pipe([report])


def test_huge_perplexity_stays_short() -> None:
    assert "val/perplexity 1.01e+304\n" in in_pipe([EvalEnd(10, "val", {"val/perplexity": 1.014e304})])


@pytest.mark.parametrize(
    ("part", "shown"), [("evaluation", "evaluating 7 s"), ("sampling", "sampling 7 s"), ("saving", "saving 7 s")]
)
@pytest.mark.parametrize("width", WIDTHS)
def test_bar_shows_the_work_between_steps(part: str, shown: str, width: int) -> None:
    seconds = iter([0.0, *[7.0] * 100])
    timer = StepTimer(torch.device("cpu"), clock=lambda: next(seconds))
    screen = Screen(width)
    sink = ConsoleSink(RunConsole(file=screen, width=width), PLAN, RunFolder(Path("runs/a")), timer)
    sink.write(TrainStart(0, PLAN, None))
    sink.write(StepEnd(10, 40960))
    with timer.phase(part):  # type: ignore[arg-type]
        sink._line.paint()
    assert f"  {shown}  0:00:0" in screen.lines[-1]
    sink.close(None)
