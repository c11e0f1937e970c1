"""The loss over the steps as a plot of characters."""

import math
from collections.abc import Mapping, Sequence
from itertools import pairwise

ROWS = 7
"""Rows of the plot itself; the steps below them take another one."""
BRAILLE_BLANK = 0x2800
BRAILLE_DOTS = ((0x01, 0x08), (0x02, 0x10), (0x04, 0x20), (0x40, 0x80))
"""Bit of each dot of a braille character, by row and column (Unicode, block "Braille Patterns")."""
VAL_MARK = "o"

Points = Mapping[int, float]
"""Step -> loss."""


def plot_losses(train: Points, val: Points, columns: int, *, unicode: bool) -> list[str]:
    """Return the lines of a plot: train/loss as a curve, each val/loss as a mark.

    A loss that is not finite is left out. Where several steps share a column, their mean is shown.

    Args:
        train: train/loss of at least two steps, else nothing is plotted.
        val: val/loss.
        columns: width of the plot with its labels.
        unicode: draw with braille characters, four times as fine as ASCII.
    """
    train = {step: loss for step, loss in train.items() if math.isfinite(loss)}
    val = {step: loss for step, loss in val.items() if math.isfinite(loss)}
    if len(train) < 2:
        return []
    losses = [*train.values(), *val.values()]
    low, high = min(losses), max(losses)
    labels = _label_rows(low, high)
    margin = max(map(len, labels)) + 2  # a space and the axis
    width = columns - margin
    if width < 2:
        return []
    first, last = min(train), max([*train, *val])
    per_column, per_row = (2, 4) if unicode else (1, 1)
    plane = _Plane(first, last, low, high, n_x=width * per_column, n_y=ROWS * per_row)
    cells = _draw_braille(plane, train, width) if unicode else _draw_ascii(plane, train, width)
    for step, loss in val.items():
        if step >= first:
            x, y = plane.locate(step, loss)
            cells[y // per_row][x // per_column] = VAL_MARK
    axis = "│" if unicode else "|"
    lines = [f"{label:>{margin - 2}} {axis}{''.join(row)}".rstrip() for label, row in zip(labels, cells, strict=True)]
    return [*lines, _label_steps(first, last, margin, width)]


class _Plane:
    """Dots of a plot: x grows with the step, y downwards."""

    def __init__(self, first: int, last: int, low: float, high: float, *, n_x: int, n_y: int):
        self._first, self._steps = first, max(1, last - first)
        self._high, self._height = high, (high - low) or 1.0
        self.n_x, self._n_y = n_x, n_y

    def locate(self, step: int, loss: float) -> tuple[int, int]:
        """Return the dot of a loss."""
        x = round((step - self._first) / self._steps * (self.n_x - 1))
        return x, self._row(loss)

    def trace(self, points: Points) -> list[tuple[int, int, int]]:
        """Return x and the y from which to which the curve goes there, for each x from its first to its last point."""
        sums: dict[int, list[float]] = {}
        for step, loss in points.items():
            sums.setdefault(self.locate(step, loss)[0], []).append(loss)
        means = {x: math.fsum(losses) / len(losses) for x, losses in sorted(sums.items())}
        rows = {x: self._row(loss) for x, loss in means.items()}
        for (left, start), (right, end) in pairwise(list(means.items())):
            for x in range(left + 1, right):
                rows[x] = self._row(start + (end - start) * (x - left) / (right - left))
        ordered = sorted(rows.items())
        spans = [(ordered[0][0], ordered[0][1], ordered[0][1])]
        for (_, before), (x, y) in pairwise(ordered):
            start = before + (y > before) - (y < before)  # next to the dot before, so that steep parts have no gaps
            spans.append((x, min(start, y), max(start, y)))
        return spans

    def _row(self, loss: float) -> int:
        return round((self._high - loss) / self._height * (self._n_y - 1))


def _draw_braille(plane: _Plane, train: Points, width: int) -> list[list[str]]:
    bits = [[0] * width for _ in range(ROWS)]
    for x, top, bottom in plane.trace(train):
        for y in range(top, bottom + 1):
            bits[y // 4][x // 2] |= BRAILLE_DOTS[y % 4][x % 2]
    return [[chr(BRAILLE_BLANK + cell) if cell else " " for cell in row] for row in bits]


def _draw_ascii(plane: _Plane, train: Points, width: int) -> list[list[str]]:
    cells = [[" "] * width for _ in range(ROWS)]
    for x, top, bottom in plane.trace(train):
        for y in range(top, bottom + 1):
            cells[y][x] = "*"
    return cells


def _label_rows(low: float, high: float) -> Sequence[str]:
    """Return the label of each row: the highest, the middle and the lowest loss."""
    labels = [""] * ROWS
    for row, loss in ((0, high), (ROWS // 2, (low + high) / 2), (ROWS - 1, low)):
        labels[row] = f"{loss:.2f}" if abs(loss) < 1e4 else f"{loss:.1e}"
    return labels


def _label_steps(first: int, last: int, margin: int, width: int) -> str:
    left, right = f"step {first:,}", f"{last:,}"
    gap = width - len(left) - len(right)
    return " " * margin + (left + " " * gap + right if gap > 0 else left)
