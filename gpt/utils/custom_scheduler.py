"""Learning-rate schedules: pure functions of the step, so no schedule has a state to checkpoint.

A schedule maps the number of steps already taken (0 before the first update) to the lr multiplier of the next update,
lr = max_lr * multiplier. `floor` is min_lr / max_lr. To add one: docs/extending.md, "A schedule".
"""

import math
from collections.abc import Callable
from functools import partial

from gpt.configs.lr_config import LRConfig

Schedule = Callable[[int], float]
"""step -> lr multiplier."""


def build_schedule(lr: LRConfig, max_steps: int) -> Schedule:
    """Return the schedule of `lr`, warmup included, over a run of `max_steps`.

    >>> schedule = build_schedule(LRConfig(schedule="wsd", warmup_steps=2, decay_steps=2), max_steps=6)
    >>> [schedule(step) for step in range(6)]
    [0.5, 1.0, 1.0, 1.0, 1.0, 0.5]

    Args:
        lr: settings, with `decay_steps` resolved.
        max_steps: number of updates.
    """
    floor, warmup_steps, decay_steps = lr.min_lr / lr.max_lr, lr.warmup_steps, lr.decay_steps
    schedules: dict[str, Schedule] = {
        "cosine": partial(cosine_decay, start=warmup_steps, decay_steps=decay_steps, floor=floor),
        "linear": partial(linear_decay, start=warmup_steps, decay_steps=decay_steps, floor=floor),
        # Warmup, stable, decay: MiniCPM, Hu et al. 2024, section 4, with a linear decay at the end of the run.
        "wsd": partial(
            linear_decay, start=max(warmup_steps, max_steps - decay_steps), decay_steps=decay_steps, floor=floor
        ),
        "inverse-sqrt": partial(inverse_sqrt_decay, warmup_steps=warmup_steps, floor=floor),
        "constant": constant,
    }
    after_warmup = schedules[lr.schedule]

    def multiplier(step: int) -> float:
        return linear_warmup(step, warmup_steps) if step < warmup_steps else after_warmup(step)

    return multiplier


def linear_warmup(step: int, warmup_steps: int) -> float:
    """Return the lr multiplier (step + 1) / warmup_steps.

    >>> [linear_warmup(step, warmup_steps=4) for step in range(4)]
    [0.25, 0.5, 0.75, 1.0]
    """
    return (step + 1) / warmup_steps


def cosine_decay(step: int, *, start: int, decay_steps: int, floor: float) -> float:
    """Return the lr multiplier floor + (1 - floor) * (1 + cos(pi * p)) / 2, where p = (step - start) / decay_steps.

    SGDR, Loshchilov and Hutter 2017, equation 5, one period. p is clipped to [0, 1].

    >>> [round(cosine_decay(step, start=2, decay_steps=4, floor=0.1), 3) for step in range(1, 8)]
    [1.0, 1.0, 0.868, 0.55, 0.232, 0.1, 0.1]
    """
    return floor + (1 - floor) * ((1 + math.cos(math.pi * _progress(step, start, decay_steps))) / 2)


def linear_decay(step: int, *, start: int, decay_steps: int, floor: float) -> float:
    """Return the lr multiplier floor + (1 - floor) * (1 - p), where p = (step - start) / decay_steps.

    p is clipped to [0, 1].

    >>> [linear_decay(step, start=2, decay_steps=4, floor=0.0) for step in range(1, 8)]
    [1.0, 1.0, 0.75, 0.5, 0.25, 0.0, 0.0]
    """
    return floor + (1 - floor) * (1 - _progress(step, start, decay_steps))


def inverse_sqrt_decay(step: int, *, warmup_steps: int, floor: float) -> float:
    """Return the lr multiplier sqrt(warmup_steps / (step + 1)), at most 1 and at least `floor`.

    Attention Is All You Need, Vaswani et al. 2017, equation 3.

    >>> [inverse_sqrt_decay(step, warmup_steps=4, floor=0.4) for step in (3, 15, 63)]
    [1.0, 0.5, 0.4]
    """
    reference = max(1, warmup_steps)
    return max(floor, math.sqrt(reference / max(reference, step + 1)))


def constant(step: int) -> float:
    """Return the lr multiplier 1.

    >>> [constant(step) for step in (0, 1000)]
    [1.0, 1.0]
    """
    return 1.0


def _progress(step: int, start: int, decay_steps: int) -> float:
    """Return which part of a decay is over before an update, from 0 to 1."""
    return min(1.0, max(0.0, (step - start) / decay_steps))
