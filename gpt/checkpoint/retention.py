"""Which checkpoints a run keeps: pure functions of their steps and losses."""

from collections.abc import Mapping, Sequence


def steps_to_keep(steps: Sequence[int], losses: Mapping[int, float], *, keep: int, keep_best: bool) -> set[int]:
    """Of sound checkpoints those to keep.

    Args:
        steps: of all of them.
        losses: val/loss of those that were evaluated.
        keep: how many of the newest; 0: all.
        keep_best: whether the one of the lowest loss as well.
    """
    chosen = set(sorted(steps)[-keep:] if keep else steps)
    if keep_best and (evaluated := losses.keys() & set(steps)):
        chosen.add(min(evaluated, key=lambda step: (losses[step], -step)))
    return chosen
