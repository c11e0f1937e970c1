"""Draw the training and validation loss of a run as an SVG that is readable on light and dark pages.

    python gpt/main.py
    python -m benchmarks.loss_curve runs/quickstart docs/images/quickstart-loss.svg

The values are those of the run's metrics.jsonl. No plotting library is needed.
"""

import argparse
import json
import math
from pathlib import Path

WIDTH, HEIGHT = 720, 360
LEFT, RIGHT, TOP, BOTTOM = 64, 16, 16, 48
"""Margins around the plot, in pixels."""
TEXT_COLOR, TRAIN_COLOR, VAL_COLOR = "#7d8590", "#2f81f7", "#e3742b"
"""Contrast of at least 3:1 on both white and black."""
MAX_X_TICKS = 8

Point = tuple[float, float]


def main() -> None:
    """Read the metrics of a run and write the SVG."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run_dir", type=Path)
    parser.add_argument("svg", type=Path)
    arguments = parser.parse_args()
    lines = (arguments.run_dir / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    records = [json.loads(line) for line in lines]
    train, val = (
        [(record["step"], record[name]) for record in records if name in record] for name in ("train/loss", "val/loss")
    )
    arguments.svg.parent.mkdir(parents=True, exist_ok=True)
    arguments.svg.write_text(render_svg(train, val), encoding="utf-8")
    print(f"{arguments.svg}: {len(train)} training losses, {len(val)} validation losses")


def render_svg(train: list[Point], val: list[Point]) -> str:
    """Return an SVG with one line for `train` and one marker with its value for each point of `val`."""
    max_step = max(step for step, _ in train)
    losses = [loss for _, loss in (*train, *val)]
    low, high = math.floor(min(losses)), math.ceil(max(losses))

    def to_pixels(step: float, loss: float) -> Point:
        x = LEFT + step / max_step * (WIDTH - LEFT - RIGHT)
        return x, TOP + (high - loss) / (high - low) * (HEIGHT - TOP - BOTTOM)

    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" width="{WIDTH}" height="{HEIGHT}" '
        f'font-family="sans-serif" font-size="13" fill="{TEXT_COLOR}">'
    ]
    for loss in range(low, high + 1):
        _, y = to_pixels(0, loss)
        parts.append(_grid_line(LEFT, y, WIDTH - RIGHT, y))
        parts.append(f'<text x="{LEFT - 8}" y="{y + 4:.1f}" text-anchor="end">{loss}</text>')
    for step in _x_ticks(max_step):
        x, _ = to_pixels(step, low)
        parts.append(f'<text x="{x:.1f}" y="{HEIGHT - BOTTOM + 18}" text-anchor="middle">{step}</text>')
    x_middle, y_middle = LEFT + (WIDTH - LEFT - RIGHT) / 2, TOP + (HEIGHT - TOP - BOTTOM) / 2
    parts.append(f'<text x="{x_middle}" y="{HEIGHT - 10}" text-anchor="middle">step</text>')
    rotation = f'transform="rotate(-90 18 {y_middle})"'
    parts.append(f'<text x="18" y="{y_middle}" text-anchor="middle" {rotation}>loss (nats per token)</text>')
    points = " ".join(f"{x:.1f},{y:.1f}" for x, y in (to_pixels(*point) for point in train))
    parts.append(f'<polyline points="{points}" fill="none" stroke="{TRAIN_COLOR}" stroke-width="2"/>')
    for step, loss in val:
        x, y = to_pixels(step, loss)
        parts.append(f'<circle cx="{x:.1f}" cy="{y:.1f}" r="5" fill="{VAL_COLOR}"/>')
        y = min(y + 34, HEIGHT - BOTTOM - 4)  # above the axis
        parts.append(f'<text x="{x - 6:.1f}" y="{y:.1f}" text-anchor="end" fill="{VAL_COLOR}">{loss:.3f}</text>')
    for row, (name, color) in enumerate((("train/loss", TRAIN_COLOR), ("val/loss, whole validation set", VAL_COLOR))):
        x, y = WIDTH - 240, TOP + 24 + 22 * row
        parts.append(f'<rect x="{x}" y="{y - 9}" width="14" height="8" fill="{color}"/>')
        parts.append(f'<text x="{x + 22}" y="{y}">{name}</text>')
    return "\n".join([*parts, "</svg>"]) + "\n"


def _grid_line(x1: float, y1: float, x2: float, y2: float) -> str:
    return f'<line x1="{x1}" y1="{y1:.1f}" x2="{x2}" y2="{y2:.1f}" stroke="{TEXT_COLOR}" stroke-opacity="0.3"/>'


def _x_ticks(max_step: int) -> list[int]:
    """Return multiples of a round step from 0 to `max_step`, at most MAX_X_TICKS + 1 of them."""
    magnitude = 10 ** max(0, math.floor(math.log10(max_step / MAX_X_TICKS)))
    spacing = next(factor * magnitude for factor in (1, 2, 5, 10) if factor * magnitude * MAX_X_TICKS >= max_step)
    return list(range(0, max_step + 1, spacing))


if __name__ == "__main__":
    main()
