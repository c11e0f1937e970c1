"""Judge the heartbeats of the ranks: which of them hang, and in what words.

- A rank is silent if it beats no more: its process is stopped, or its machine is gone.
- A rank is blocked if its training thread is inside a step and has waited for the timeout without coming any further.
- The ranks that hold up a blocked rank are those that have come least far.

Work between two steps may take as long as it likes: nobody is blocked in it.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple, Self

from gpt.utils.helper import format_ranks

GRACE_SECONDS = 2.0
"""Time that main threads have to report a rank by themselves, with what they know."""
MIN_SILENCE_SECONDS = 5.0
"""A busy machine may keep a thread waiting for so long; a rank is not silent before."""
MAX_PLACES = 4
"""Ranks whose place in the code a message names."""


class Progress(NamedTuple):
    """Progress of a training thread; every rank counts the same."""

    step: int
    """Steps completed."""
    parts: int
    """Parts of the step timer entered since."""
    in_step: bool
    """The last of them is a phase of a training step."""


NO_PROGRESS = Progress(0, 0, in_step=False)
"""Progress of a rank that does not train."""


class Beat(NamedTuple):
    """Record of one rank, which writes it to the store a few times per timeout."""

    number: int
    progress: Progress
    blocked: bool
    """Its training thread has waited in a step for the timeout."""
    failed: bool
    """Its training thread has seen a collective fail."""
    place: str
    """File and line of its training thread, if that has not come any further lately."""


@dataclass(frozen=True)
class Sighting:
    """The last beat that was read of a rank."""

    beat: Beat
    heard_at: float
    """Time at which it was new."""
    advanced_at: float
    """Time at which its progress was new."""


@dataclass(frozen=True)
class Limits:
    """Seconds after which a rank is judged."""

    failure: str
    """Predicate of a message: what a rank failed to do, for how long, and the flag that sets the time."""
    silence: float
    """Seconds without a beat."""
    stall: float
    """Seconds without progress."""

    @classmethod
    def for_steps(cls, timeout: float) -> Self:
        """Return the limits while a run trains."""
        return cls._from_timeout(timeout, f"took no part in a step for {timeout:g} s (--parallel.step-timeout)")

    @classmethod
    def for_start(cls, timeout: float) -> Self:
        """Return the limits before a run trains."""
        return cls._from_timeout(timeout, f"did not answer for {timeout:g} s (--parallel.start-timeout)")

    @classmethod
    def _from_timeout(cls, timeout: float, failure: str) -> Self:
        return cls(failure, max(timeout, MIN_SILENCE_SECONDS) + GRACE_SECONDS, timeout + GRACE_SECONDS)


def find_silent_ranks(sightings: Mapping[int, Sighting], now: float, limits: Limits) -> list[int]:
    """Return the ranks that beat no more."""
    return [rank for rank, seen in sightings.items() if now - seen.heard_at > limits.silence]


def find_hung_ranks(sightings: Mapping[int, Sighting], now: float, limits: Limits) -> list[int]:
    """Return the ranks that the others wait for; empty if no rank hangs.

    Args:
        sightings: rank -> last beat, for all ranks.
        now: on the clock of the sightings.
        limits: when to judge.
    """
    if silent := find_silent_ranks(sightings, now, limits):
        return silent
    if not any(seen.beat.blocked or seen.beat.failed for seen in sightings.values()):
        return []
    places = {rank: seen.beat.progress[:2] for rank, seen in sightings.items() if not seen.beat.failed}
    last = [rank for rank, place in places.items() if place == min(places.values())]
    return last if any(now - sightings[rank].advanced_at > limits.stall for rank in last) else []


def describe_hang(hung: Sequence[int], sightings: Mapping[int, Sighting], now: float, limits: Limits) -> str:
    """Return one line that names the ranks that hang, and where they are and those that have stalled in a step."""
    parts = [f"{format_ranks(hung)} {limits.failure}"]
    silent = find_silent_ranks({rank: sightings[rank] for rank in hung}, now, limits)
    if silent:
        parts.append(f"{format_ranks(silent)}: the process is stopped, or its machine is gone")
    waiting = [
        rank
        for rank, seen in sightings.items()
        if rank not in hung and seen.beat.progress.in_step and now - seen.advanced_at > limits.stall / 2
    ]
    for rank in [rank for rank in (*hung, *waiting) if rank not in silent][:MAX_PLACES]:
        beat = sightings[rank].beat
        parts.append(f"rank {rank} waits in step {beat.progress.step + 1} at {beat.place or 'an unknown place'}")
    return "; ".join(parts)
