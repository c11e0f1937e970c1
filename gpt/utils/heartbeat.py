"""Heartbeats: two threads that find a rank which hangs, whatever the main threads are blocked in.

Each rank writes beats to the store of the ranks. Rank 0 judges those of all ranks; the others judge that of rank 0.
docs/adr/0021-heartbeats-find-hung-ranks.md says why.
"""

import atexit
import contextlib
import json
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NoReturn

from gpt.utils.flight_recorder import FlightRecorder
from gpt.utils.hang import (
    MIN_SILENCE_SECONDS,
    NO_PROGRESS,
    Beat,
    Limits,
    Progress,
    Sighting,
    describe_hang,
    find_hung_ranks,
    find_silent_ranks,
)
from gpt.utils.interrupts import leave, write_error
from gpt.utils.training_thread import TrainingThread

BEATS_PER_TIMEOUT = 20
MIN_INTERVAL_SECONDS, MAX_INTERVAL_SECONDS = 0.25, 10.0
"""Bounds of the seconds between two beats."""
SUSPENSION_SECONDS = 2.0
"""Delay of the judging thread from which on the process counts as having been suspended."""
VERDICT_SECONDS = 1.0
"""Time to write the verdict, and for the other ranks to read it before rank 0, which may hold the store, ends."""
DEPUTY_SECONDS = 5.0
"""Time that rank 1 has to report that rank 0 is silent, before all others do."""
USER_ERROR_STATUS = 2
VERDICT_KEY = "hang verdict"
RESUME_REMEDY = "the same command resumes the run from its last checkpoint"


class Heartbeat:
    """The threads of one rank that beat and judge; they end with the process, or in `stop`.

    One thread speaks to the store, where it may block for ever if the store's process is stopped. The other judges.

    Args:
        store: connection of its own to the store of the ranks.
        rank: this process's rank.
        world_size: number of ranks.
        timeout: seconds that a step waits for a rank.
        waits_idle: whether a thread that waits for another rank uses no time, as on a CPU.
        recorder: writes the last collectives before a rank ends because of a hang; None: there is none.
    """

    def __init__(
        self,
        store: Any,
        rank: int,
        world_size: int,
        *,
        timeout: float,
        waits_idle: bool,
        recorder: FlightRecorder | None = None,
    ):
        self._store, self._rank, self._timeout = store, rank, timeout
        self._peers = range(world_size) if rank == 0 else range(1)
        self._recorder = recorder
        self._interval = min(max(timeout / BEATS_PER_TIMEOUT, MIN_INTERVAL_SECONDS), MAX_INTERVAL_SECONDS)
        self._training_thread = TrainingThread(timeout, waits_idle=waits_idle)
        self._limits: Limits | None = None
        self._has_failed = False
        self._sightings: dict[int, Sighting] = {}
        self.verdict = ""
        """Message of the rank that ends the run because of a hang; empty while none does."""
        self._is_written = threading.Event()
        self._wake, self._ended = threading.Event(), threading.Event()
        self._threads = [
            threading.Thread(target=work, name=name, daemon=True)
            for work, name in ((self._beat, "heartbeat"), (self._judge, "heartbeat judge"))
        ]
        for thread in self._threads:
            thread.start()
        atexit.register(self.stop)

    @contextmanager
    def watching(self, limits: Limits) -> Iterator[None]:
        """Judge the other ranks by `limits`, unless they are judged already."""
        if self._limits is not None or self._has_failed:
            yield
            return
        self._start_judging(limits)
        try:
            yield
        finally:
            self._limits = None

    def start_training(self, read_progress: Callable[[], Progress]) -> None:
        """Judge the ranks by the step timeout from now on; called in the training thread.

        Args:
            read_progress: returns this rank's progress, from any thread.
        """
        self._training_thread.follow(read_progress)
        self._start_judging(Limits.for_steps(self._timeout))

    def end_training(self) -> None:
        """Judge no more."""
        self._limits = None
        self._training_thread.follow(None)

    def report_failure(self) -> None:
        """Let the other ranks know that a collective has failed here; this rank judges no more, but reports it."""
        self._has_failed, self._limits = True, None
        self._wake.set()

    def is_silent(self, rank: int) -> bool:
        """Return whether a rank has not been heard of for half the timeout."""
        seen, limit = self._sightings.get(rank), max(self._timeout, MIN_SILENCE_SECONDS) / 2
        return seen is not None and time.monotonic() - seen.heard_at > limit

    def is_stuck(self, rank: int) -> bool:
        """Return whether a rank is silent, or has come no further in its training for half the timeout."""
        seen = self._sightings.get(rank)
        if seen is None or seen.beat.progress == NO_PROGRESS:
            return self.is_silent(rank)
        return time.monotonic() - seen.advanced_at > self._timeout / 2

    def stop(self) -> None:
        """End both threads."""
        self._limits = None
        self._ended.set()
        self._wake.set()
        for thread in self._threads:
            thread.join(VERDICT_SECONDS)
        atexit.unregister(self.stop)

    def _start_judging(self, limits: Limits) -> None:
        self._renew_sightings()
        self._limits = limits

    def _renew_sightings(self) -> None:
        """Let all ranks count as just heard, because this one has not judged them for a while."""
        now = time.monotonic()
        self._sightings = {rank: Sighting(seen.beat, now, now) for rank, seen in self._sightings.items()}

    def _beat(self) -> None:
        """Write this rank's beats and read the others', until the end or until the store is gone."""
        number = 0
        with contextlib.suppress(RuntimeError):
            while not self._ended.is_set():
                number += 1
                examined, place = self._training_thread.examine(), self._training_thread.find_place()
                self._store.set(f"beat/{self._rank}", json.dumps(Beat(number, *examined, self._has_failed, place)))
                for rank in self._peers:
                    if self._store.check([f"beat/{rank}"]):
                        self._see(rank, json.loads(self._store.get(f"beat/{rank}")))
                self._exchange_verdict()
                self._wake.wait(self._interval)
                self._wake.clear()

    def _exchange_verdict(self) -> None:
        if self.verdict:
            self._store.set(VERDICT_KEY, self.verdict)
            self._is_written.set()
        elif self._store.check([VERDICT_KEY]):
            self.verdict = self._store.get(VERDICT_KEY).decode()

    def _see(self, rank: int, fields: list[Any]) -> None:
        number, progress, *rest = fields
        beat, now, seen = Beat(number, Progress(*progress), *rest), time.monotonic(), self._sightings.get(rank)
        if seen is None or seen.beat.progress != beat.progress:
            self._sightings[rank] = Sighting(beat, now, now)
        elif seen.beat.number != number:
            self._sightings[rank] = Sighting(beat, now, seen.advanced_at)

    def _judge(self) -> None:
        judged_at = time.monotonic()
        while not self._ended.wait(self._interval):
            now = time.monotonic()
            if now - judged_at > self._interval + SUSPENSION_SECONDS:  # by Ctrl-Z, a debugger, or a sleeping machine
                self._renew_sightings()
            judged_at = now
            if self.verdict:
                self._end_process()
            limits, sightings = self._limits, dict(self._sightings)
            if limits is None:
                continue
            if self._rank == 0:
                hung = find_hung_ranks(sightings, now, limits)
            else:
                delay = 0 if self._rank == 1 else DEPUTY_SECONDS
                hung = find_silent_ranks(sightings, now - delay, limits)
            if hung and self._limits is not None:
                note = "" if self._recorder is None else self._recorder.note
                self._report(f"{describe_hang(hung, sightings, now, limits)}; {RESUME_REMEDY}{note}")

    def _report(self, message: str) -> NoReturn:
        """Report a hang, let the other ranks read the message, and end the process."""
        write_error(f"gpt: error: {message}")
        self.verdict = message
        self._wake.set()
        self._is_written.wait(VERDICT_SECONDS)
        if self._is_written.is_set():
            time.sleep(self._interval + VERDICT_SECONDS)
        self._end_process()

    def _end_process(self) -> NoReturn:
        if self._recorder is not None:
            self._recorder.write()
        leave(USER_ERROR_STATUS)
