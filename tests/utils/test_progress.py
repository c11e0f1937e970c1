import logging
from io import StringIO

import pytest
from rich.cells import cell_len

from gpt.utils import progress
from gpt.utils.progress import Progress, progress_bar, work_line
from tests.utils.screen import Screen
from tests.utils.test_terminal import WIDTHS

pytestmark = pytest.mark.usefixtures("capable_terminal")


def half_done(total: int = 2_000_000) -> Progress:
    seconds = iter([0.0, *[10.0] * 100])
    work = Progress("tokenizing", total, clock=lambda: next(seconds))
    work.advance(1_000_000, 250_000)
    return work


@pytest.mark.parametrize("columns", [*WIDTHS, 40, 20, 12, 5])
@pytest.mark.parametrize("total", [2_000_000, 0])
def test_progress_fits_every_terminal(columns: int, total: int) -> None:
    text = half_done(total).render(columns).plain
    assert cell_len(text) <= columns
    assert text == text.strip()
    assert "…" not in text
    if columns >= 12:
        assert text.startswith("tokenizing")


def test_progress_shows_size_times_and_speed() -> None:
    text = half_done().render(120).plain
    for part in ("1 MB of 2 MB", "0:00:10 elapsed, 0:00:10 left", "25 k tokens/s", "━" * 15 + "─" * 15):
        assert part in text
    assert "#" * 15 + "-" * 15 in half_done().render(120, unicode=False).plain


def test_work_without_a_total_shows_its_time() -> None:
    seconds = iter([0.0, 75.0])
    assert Progress("compiling the model", 0, clock=lambda: next(seconds)).render(80).plain == (
        "compiling the model  0:01:15 elapsed"
    )


def test_nothing_is_left_on_the_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    screen = Screen(80)
    monkeypatch.setattr("sys.stderr", screen)
    with progress_bar("tokenizing", 100) as advance, work_line("compiling"):
        advance(50, 10)
    assert screen.lines == [""]


def test_without_a_terminal_a_message_comes_now_and_then(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    err = StringIO()
    monkeypatch.setattr("sys.stderr", err)
    monkeypatch.setattr(progress, "SECONDS_PER_MESSAGE", 0.0)
    with caplog.at_level(logging.INFO), progress_bar("tokenizing", 100) as advance:
        advance(50, 0)
    assert err.getvalue() == ""
    (message,) = caplog.messages
    assert message.startswith("tokenizing, 50 B of 100 B, 0:00:00 elapsed")
