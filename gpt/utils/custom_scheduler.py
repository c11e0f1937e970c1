"""Learning-rate schedules: pure functions from a step to a multiplier of max_lr, so nothing is checkpointed."""

import math
from collections.abc import Callable

from gpt.configs.lr_config import LRConfig

Schedule = Callable[[int], float]
"""Steps already taken (0 before the first update) -> factor of max_lr for the next update."""


def build_schedule(lr: LRConfig, max_steps: int) -> Schedule:
    """The schedule of `lr` over a run of `max_steps`; `lr.decay_steps` must be resolved.

    Update s has the rate max_lr * (s + 1) / warmup_steps during warmup. A decay of D steps that starts at step S
    gives update s the progress (s - S) / D, clipped to [0, 1], on the way from max_lr to min_lr.
    """
    shape = _SHAPES[lr.schedule](lr, max_steps)

    def multiplier(step: int) -> float:
        if step < lr.warmup_steps:
            return (step + 1) / lr.warmup_steps
        return shape(step)

    return multiplier


def _decay(start: int, lr: LRConfig, curve: Callable[[float], float]) -> Schedule:
    floor = lr.min_lr / lr.max_lr

    def at(step: int) -> float:
        progress = min(1.0, max(0.0, (step - start) / lr.decay_steps))
        return floor + (1 - floor) * curve(progress)

    return at


def _cosine(lr: LRConfig, max_steps: int) -> Schedule:
    """SGDR, Loshchilov and Hutter 2017, equation 5, one period."""
    return _decay(lr.warmup_steps, lr, lambda progress: (1 + math.cos(math.pi * progress)) / 2)


def _linear(lr: LRConfig, max_steps: int) -> Schedule:
    return _decay(lr.warmup_steps, lr, lambda progress: 1 - progress)


def _wsd(lr: LRConfig, max_steps: int) -> Schedule:
    """Warmup, stable, decay: MiniCPM, Hu et al. 2024, section 4, with a linear decay at the end of the run."""
    return _decay(max(lr.warmup_steps, max_steps - lr.decay_steps), lr, lambda progress: 1 - progress)


def _inverse_sqrt(lr: LRConfig, max_steps: int) -> Schedule:
    """Attention Is All You Need, Vaswani et al. 2017, equation 3, never below min_lr."""
    reference = max(1, lr.warmup_steps)
    return lambda step: max(lr.min_lr / lr.max_lr, math.sqrt(reference / max(reference, step + 1)))


def _constant(lr: LRConfig, max_steps: int) -> Schedule:
    return lambda step: 1.0


_SHAPES: dict[str, Callable[[LRConfig, int], Schedule]] = {
    "cosine": _cosine,
    "linear": _linear,
    "wsd": _wsd,
    "inverse-sqrt": _inverse_sqrt,
    "constant": _constant,
}
