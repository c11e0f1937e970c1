"""Global batches that no step trains on, and so which batch each step takes."""

from bisect import insort
from collections.abc import Iterable


class Quarantine:
    """Batches are numbered in the run's order, from 0; a step takes the next one that is not in quarantine.

    The map depends on nothing but the set of batches. One more of them leaves the batch of every step before its own
    as it was, so a run that goes back to before a bad step, and then goes on without that step's batch, is the run that
    never had it.
    """

    def __init__(self, batches: Iterable[int] = ()):
        self._batches = sorted(set(batches))

    def add(self, batch: int) -> None:
        """Leave a batch out; twice is as good as once."""
        if batch not in self:
            insort(self._batches, batch)

    def __contains__(self, batch: int) -> bool:
        return batch in self._batches

    def batch_of(self, step: int) -> int:
        """The batch that is trained on after `step` others."""
        batch = step
        for quarantined in self._batches:
            if quarantined > batch:
                break
            batch += 1
        return batch
