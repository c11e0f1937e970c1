"""Global batches that the run leaves out, and the batch that each step takes because of them."""

from bisect import insort
from collections.abc import Iterable


class Quarantine:
    """A set of global batches to leave out. Batches are numbered in the run's order, from 0.

    Each step takes the next batch that is not in quarantine. This map depends on the set alone, and adding a batch
    changes no step before the one that took it. So a run that rolls back to before a bad step and leaves that step's
    batch out is bit-exactly the run that never had the batch.

    >>> quarantine = Quarantine([2, 3])
    >>> [quarantine.find_batch(step) for step in range(5)]
    [0, 1, 4, 5, 6]

    Args:
        batches: to leave out from the start.
    """

    def __init__(self, batches: Iterable[int] = ()):
        self._batches = sorted(set(batches))

    def add(self, batch: int) -> None:
        """Leave a batch out; adding it again changes nothing."""
        if batch not in self:
            insort(self._batches, batch)

    def __contains__(self, batch: int) -> bool:
        return batch in self._batches

    def find_batch(self, step: int) -> int:
        """Return the batch that is trained on after `step` others."""
        batch = step
        for quarantined in self._batches:
            if quarantined > batch:
                break
            batch += 1
        return batch
