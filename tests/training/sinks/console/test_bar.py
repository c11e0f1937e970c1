import pytest
from rich.cells import cell_len

from gpt.training.sinks.console.bar import Bar, BarState, render_bar
from tests.utils.test_terminal import WIDTHS

NUMBERS = ("loss 2.5000", "2.05 k tokens/s", "MFU 45.6%")
STATE = BarState(120, 400, 20.0, 45.0, NUMBERS)
LONG = BarState(1_234_567, 10_000_000, 1e6, 1e7, NUMBERS)


@pytest.mark.parametrize(
    "state", [STATE, LONG, BarState(0, 1, 0.0, None), BarState(1, 1, 0.0, 0.0, NUMBERS, "saving 3 s")]
)
@pytest.mark.parametrize("columns", [*WIDTHS, 59, 40, 20, 5, 1])
def test_bar_fits_every_terminal_without_cutting_a_number(state: BarState, columns: int) -> None:
    text = render_bar(state, columns, unicode=True).plain
    assert cell_len(text) <= columns
    assert text == text.strip()
    shown = [part for part in text.split("  ") if part.strip("━─")]
    known = {f"step {state.step}/{state.max_steps}", state.activity, *NUMBERS}
    assert all(part in known or part.endswith((" elapsed", " left")) for part in shown)


@pytest.mark.parametrize(
    ("columns", "text"),
    [
        (59, "step 120/400  ####----------  0:00:20 elapsed, 0:00:45 left"),
        (79, "step 120/400  ######---------------  0:00:20 elapsed, 0:00:45 left  loss 2.5000"),
        (40, "step 120/400  0:00:45 left"),
        (13, "step 120/400"),
    ],
)
def test_narrow_terminal_gets_what_matters_most(columns: int, text: str) -> None:
    assert render_bar(STATE, columns, unicode=False).plain == text


def test_activity_takes_the_place_of_the_numbers() -> None:
    state = BarState(120, 400, 20.0, 45.0, NUMBERS, "evaluating 3 s")
    assert render_bar(state, 59, unicode=False).plain == ("step 120/400  evaluating 3 s  0:00:20 elapsed, 0:00:45 left")
    assert render_bar(state, 79, unicode=False).plain == (
        "step 120/400  #####-------------  evaluating 3 s  0:00:20 elapsed, 0:00:45 left"
    )


def test_remaining_time_leaves_out_the_first_step_and_counts_down_between_steps() -> None:
    now = [0.0]
    bar = Bar(100, None, unicode=True, clock=lambda: now[0])
    bar.start(10)
    assert bar.state.remaining is None
    now[0] = 30.0  # the first step compiles
    bar.end_step(11)
    assert bar.state.remaining == 30.0 * 89
    for step in range(12, 22):
        now[0] += 2.0
        bar.end_step(step)
    assert bar.state.remaining == pytest.approx(2.0 * 79)
    now[0] += 1.5
    assert bar.state.remaining == pytest.approx(2.0 * 79 - 1.5)
    assert bar.elapsed == 51.5
    bar.rewind(15)
    assert bar.state.remaining == pytest.approx(2.0 * 85 - 1.5)
    now[0] += 1e4
    assert bar.state.remaining == 0.0
