"""The rule by which a run keeps checkpoints: a pure function of their steps and losses."""

from collections.abc import Mapping, Sequence

from gpt.checkpoint.rollback import RollbackTargets


def steps_to_keep(
    steps: Sequence[int],
    losses: Mapping[int, float],
    *,
    keep: int,
    keep_best: bool,
    targets: RollbackTargets | None = None,
) -> set[int]:
    """Return the steps whose checkpoints to keep.

    >>> sorted(steps_to_keep([1, 2, 3, 4], {1: 3.0, 2: 1.5, 3: 2.0}, keep=1, keep_best=True))
    [2, 4]

    Args:
        steps: steps of all valid checkpoints.
        losses: step -> val/loss, for the steps that were evaluated.
        keep: number of newest checkpoints to keep; 0: all.
        keep_best: whether to keep the checkpoint with the lowest loss as well, of equal ones the newest.
        targets: steps to roll back to, the newest of which is kept, with the best checkpoint up to it: after a rollback
            that one is the best of the run. None: no rollback.
    """
    chosen = set(sorted(steps)[-keep:] if keep else steps)
    target = targets.find_newest(steps) if targets else None
    for last in [max(steps, default=0)] + ([] if target is None else [target]):
        if keep_best and (evaluated := losses.keys() & {step for step in steps if step <= last}):
            chosen.add(min(evaluated, key=lambda step: (losses[step], -step)))
    return chosen if target is None else chosen | {target}
