"""The checkpoints that a rollback may go back to."""

from collections.abc import Iterable
from dataclasses import dataclass


@dataclass(frozen=True)
class RollbackTargets:
    """Steps of the schedule, which alone decide where a rollback ends.

    Checkpoints of a signal, of the clock or of the best val/loss are no targets: they depend on the machine and on when
    the run was stopped, and a resumed run must go back to the same step as one that nothing interrupted.

    >>> targets = RollbackTargets(origin=37, interval=10)
    >>> [step for step in range(30, 61) if step in targets]
    [37, 40, 50, 60]
    """

    origin: int
    """Step that the run's first launch started from: 0, or that of the checkpoint that it forks."""
    interval: int
    """Steps between two scheduled checkpoints; 0: only the origin is a target."""

    def __contains__(self, step: int) -> bool:
        return step == self.origin or (step > self.origin and self.interval > 0 and step % self.interval == 0)

    def find_newest(self, steps: Iterable[int]) -> int | None:
        """Return the newest of `steps` that is a target; None if none is."""
        return max((step for step in steps if step in self), default=None)
