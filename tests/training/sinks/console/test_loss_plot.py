import math
from itertools import pairwise

import pytest
from rich.cells import cell_len

from gpt.training.sinks.console.loss_plot import ROWS, plot_losses
from tests.utils.test_terminal import WIDTHS

CURVE = {step: 3 + 6 * math.exp(-step / 80) for step in range(1, 401)}


def test_falling_loss_is_a_falling_line() -> None:
    assert plot_losses({1: 8.0, 2: 6.0, 3: 4.0, 4: 2.0}, {4: 5.0}, 19, unicode=False) == [
        "8.00 |**",
        "     |  *",
        "     |   ***",
        "5.00 |      *     o",
        "     |       ***",
        "     |          *",
        "2.00 |           **",
        "      step 1      4",
    ]


@pytest.mark.parametrize("unicode", [False, True])
@pytest.mark.parametrize("width", [*WIDTHS, 20, 12])
def test_plot_fits_its_width(width: int, unicode: bool) -> None:
    lines = plot_losses(CURVE, {200: 4.0, 400: 3.5}, width, unicode=unicode)
    assert len(lines) == ROWS + 1 <= 8
    assert all(cell_len(line) <= width and line == line.rstrip() for line in lines)
    assert all(line.isascii() for line in lines) == (not unicode)
    assert sum(line.count("o") for line in lines[:-1]) == 2
    assert lines[0].startswith("8.93 ")
    assert lines[-2].startswith("3.04 ")


@pytest.mark.parametrize("unicode", [False, True])
def test_curve_has_no_gaps(unicode: bool) -> None:
    lines = plot_losses({1: 9.0, 2: 2.0, 30: 2.1, 31: 8.0, 54: 2.0}, {}, 60, unicode=unicode)
    columns = list(zip(*(line[6:].ljust(54) for line in lines[:-1]), strict=True))
    drawn = [{row for row, character in enumerate(column) if character != " "} for column in columns]
    assert all(drawn)
    for left, right in pairwise(drawn):
        assert min(abs(a - b) for a in left for b in right) <= 1
    assert set.union(*drawn) == set(range(ROWS))


def test_losses_that_are_not_finite_are_left_out() -> None:
    assert plot_losses({1: 3.0, 2: math.nan, 3: math.inf}, {1: math.nan}, 60, unicode=True) == []
    assert plot_losses(CURVE | {401: math.nan}, {400: math.inf}, 60, unicode=True) == plot_losses(
        CURVE, {}, 60, unicode=True
    )


def test_plot_of_a_constant_or_huge_loss_is_drawn() -> None:
    for loss in (2.0, 0.0, -1.0, 1e30):
        lines = plot_losses({1: loss, 100: loss}, {}, 60, unicode=False)
        assert len(lines) == ROWS + 1
        assert all(len(line) <= 60 for line in lines)


def test_nothing_is_plotted_without_two_losses_or_room() -> None:
    assert plot_losses({}, {}, 80, unicode=True) == []
    assert plot_losses({1: 2.0}, {1: 2.0}, 80, unicode=True) == []
    assert plot_losses(CURVE, {}, 6, unicode=True) == []
