"""The recorder of a run: writes every event to sinks, none of which can end or stall the run."""

import logging
from collections.abc import Callable
from concurrent.futures import Future
from functools import partial
from queue import SimpleQueue
from threading import Thread

from gpt.training.events import Event
from gpt.training.observer import Sink
from gpt.utils.helper import first_line

log = logging.getLogger(__name__)

INTERRUPT_GRACE_SECONDS = 0.5
"""Seconds that a sink has to close when a user interrupts the process."""
MAX_WAITING_CALLS = 10_000
"""Events that wait for an essential sink which blocks."""


class Logger:
    """Writes events to its sinks on rank 0; drops one that raises or blocks, with one warning, unless it is essential.

    It waits until every sink has written an event, so that records are on the disk before the next step.

    Args:
        sink_timeout: seconds that a sink may take to write an event, or to close.
        is_main: whether this is the rank that records.
    """

    def __init__(self, sink_timeout: float, *, is_main: bool = True):
        self._timeout, self._is_main = sink_timeout, is_main
        self._sinks: list[_GuardedSink] = []
        self.is_incomplete = False
        """An essential sink could not write all of its record; known after `close`."""

    def attach(self, sink: Sink) -> None:
        """Add a sink, behind those that are attached."""
        if self._is_main:
            self._sinks.append(_GuardedSink(sink, self._timeout))

    def detach(self, sink: Sink) -> None:
        """Remove a sink; raises ValueError if it is not attached."""
        if self._is_main:
            index = [guarded.sink for guarded in self._sinks].index(sink)
            self._sinks.pop(index).end()

    def write(self, event: Event) -> None:
        """Write an event to the sinks that record its type."""
        for guarded in tuple(self._sinks):
            if not isinstance(event, guarded.sink.events):
                continue
            error = guarded.run(partial(guarded.sink.write, event))
            if error is None:
                continue
            name = type(guarded.sink).__name__
            if guarded.sink.is_essential:
                guarded.has_failed = guarded.has_failed or not isinstance(error, TimeoutError)
                log.warning("%s is behind at step %d: %s", name, event.step, first_line(error))
                continue
            self._sinks.remove(guarded)
            log.warning("%s stopped recording at step %d: %s", name, event.step, first_line(error))
            guarded.run(partial(guarded.sink.close, error))
            guarded.end()

    def flush(self) -> None:
        """Let the essential sinks write what they could not, before a state is saved: a resumed run begins after it."""
        for guarded in self._sinks:
            if guarded.sink.is_essential:
                guarded.run(guarded.sink.flush)

    def close(self, error: BaseException | None) -> None:
        """Close the sinks; one line says which essential one lacks records."""
        is_interrupted = error is not None and not isinstance(error, Exception)
        for guarded in self._sinks:
            if is_interrupted:
                guarded.timeout = min(guarded.timeout, INTERRUPT_GRACE_SECONDS)
            failure = guarded.run(partial(guarded.sink.close, error)) or guarded.wait()
            if guarded.sink.is_essential and (failure or guarded.has_failed):
                self.is_incomplete = True
                log.error("the record of the run is incomplete: %s", first_line(failure) if failure else "see above")
            elif failure:
                log.warning("%s could not be closed: %s", type(guarded.sink).__name__, first_line(failure))
            guarded.end()
        self._sinks.clear()


class _GuardedSink:
    """A sink whose methods are called on a daemon thread, which is left behind if a call blocks."""

    def __init__(self, sink: Sink, timeout: float):
        self.sink, self.timeout = sink, timeout
        self._calls: SimpleQueue[tuple[Callable[[], None], Future[None]] | None] = SimpleQueue()
        self._current: Future[None] | None = None
        self._last: Future[None] | None = None
        self.has_failed = False
        self._thread: Thread | None = None

    def run(self, call: Callable[[], None]) -> BaseException | None:
        """Return the error of a call, a TimeoutError if it blocks, or None.

        If an earlier call still blocks, this one is queued and not waited for, so a slow sink closes when it is done.
        """
        if self._thread is None:
            thread = Thread(target=self._work, name=f"sink-{type(self.sink).__name__}", daemon=True)
            try:
                thread.start()
            except RuntimeError as error:  # the system allows no more threads
                return error
            self._thread = thread
        is_blocked = self._is_blocked
        if is_blocked and self._calls.qsize() >= MAX_WAITING_CALLS:
            self.has_failed = True
            return None
        future: Future[None] = Future()
        self._calls.put((call, future))
        self._last = future
        if is_blocked:
            return None
        self._current = future
        return self._wait_for(future)

    def wait(self) -> BaseException | None:
        """Wait for the last call, if the sink is essential, and return its error or a TimeoutError."""
        return self._wait_for(self._last) if self.sink.is_essential and self._last is not None else None

    def _wait_for(self, future: Future[None]) -> BaseException | None:
        try:
            return future.exception(self.timeout)  # a signal's handler runs while this waits
        except TimeoutError:
            return TimeoutError(f"it took longer than {self.timeout:g} s (--log.sink-timeout)")

    def end(self) -> None:
        """End the thread after its last call."""
        self._calls.put(None)
        if self._thread is not None and not self._is_blocked:
            self._thread.join(self.timeout)

    @property
    def _is_blocked(self) -> bool:
        return self._current is not None and not self._current.done()

    def _work(self) -> None:
        while (item := self._calls.get()) is not None:
            call, future = item
            try:
                call()
            except BaseException as error:
                future.set_exception(error)
            else:
                future.set_result(None)
