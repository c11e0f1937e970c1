import logging
import os
import signal
import threading
import time
from pathlib import Path

import pytest

from gpt.training.events import Event
from gpt.training.logger import Logger
from gpt.training.observer import Sink
from gpt.training.sinks.jsonl import JsonlSink
from tests.training.example_events import EVENTS


class Raising(Sink):
    """Fails at the first event."""

    closed: BaseException | None = None

    def write(self, event: Event) -> None:
        raise ConnectionError("the service is down\nsee its site")

    def close(self, error: BaseException | None) -> None:
        self.closed = error
        raise ConnectionError("still down")


class Blocking(Sink):
    """Blocks at the first event until the test releases it."""

    def __init__(self) -> None:
        self.events_begun: list[Event] = []
        self.release, self.closed = threading.Event(), threading.Event()

    def write(self, event: Event) -> None:
        self.events_begun.append(event)
        self.release.wait()

    def close(self, error: BaseException | None) -> None:
        self.closed.set()


def test_sink_that_raises_is_dropped_with_one_warning_and_others_go_on(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    logger, raising = Logger(60.0), Raising()
    logger.attach(raising)
    logger.attach(JsonlSink(tmp_path / "m", tmp_path / "s"))
    with caplog.at_level(logging.WARNING):
        for event in EVENTS:
            logger.write(event)
        logger.close(None)
    assert [record.message for record in caplog.records] == ["Raising stopped recording at step 0: the service is down"]
    assert isinstance(raising.closed, ConnectionError)
    assert (tmp_path / "m").read_text().count("\n") == 2


def test_sink_that_blocks_is_dropped_after_the_timeout_with_one_warning(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    logger, blocking = Logger(0.2), Blocking()
    logger.attach(blocking)
    logger.attach(JsonlSink(tmp_path / "m", tmp_path / "s"))
    start = time.monotonic()
    with caplog.at_level(logging.WARNING):
        for event in EVENTS:
            logger.write(event)
        logger.close(None)
    assert time.monotonic() - start < 2 * 0.2  # it delays the run once
    assert [record.message for record in caplog.records] == [
        "Blocking stopped recording at step 0: it took longer than 0.2 s (--log.sink-timeout)"
    ]
    assert (tmp_path / "m").read_text().count("\n") == 2
    assert not blocking.closed.is_set()
    blocking.release.set()
    assert blocking.closed.wait(10)  # a sink that was only slow is closed when it is done
    assert blocking.events_begun == EVENTS[:1]


def test_sink_that_blocks_in_close_does_not_block_the_end(caplog: pytest.LogCaptureFixture) -> None:
    class BlockingAtEnd(Sink):
        def write(self, event: Event) -> None: ...

        def close(self, error: BaseException | None) -> None:
            forever.wait()

    forever, logger = threading.Event(), Logger(0.1)
    logger.attach(BlockingAtEnd())
    with caplog.at_level(logging.WARNING):
        logger.write(EVENTS[0])
        logger.close(None)
    assert [record.message for record in caplog.records] == [
        "BlockingAtEnd could not be closed: it took longer than 0.1 s (--log.sink-timeout)"
    ]
    forever.set()


def test_interrupt_ends_the_wait_for_a_sink_and_its_close() -> None:
    logger, blocking = Logger(60.0), Blocking()
    logger.attach(blocking)
    start = time.monotonic()
    threading.Timer(0.2, os.kill, (os.getpid(), signal.SIGINT)).start()
    with pytest.raises(KeyboardInterrupt):
        logger.write(EVENTS[0])
    logger.close(KeyboardInterrupt())
    assert time.monotonic() - start < 30
    blocking.release.set()
    assert blocking.closed.wait(10)


def test_event_is_written_before_the_logger_returns_and_always_on_one_thread() -> None:
    class Noting(Sink):
        def write(self, event: Event) -> None:
            time.sleep(0.01)
            written.append((event, threading.get_ident()))

    written: list[tuple[Event, int]] = []
    logger = Logger(60.0)
    logger.attach(Noting())
    for count, event in enumerate(EVENTS, 1):
        logger.write(event)
        assert len(written) == count
    logger.close(None)
    assert [event for event, _ in written] == EVENTS
    assert len({thread for _, thread in written}) == 1
    assert threading.get_ident() not in {thread for _, thread in written}


def test_sink_without_a_thread_is_dropped(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(thread: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(threading.Thread, "start", fail)
    logger = Logger(60.0)
    logger.attach(Raising())
    with caplog.at_level(logging.WARNING):
        logger.write(EVENTS[0])
        logger.close(None)
    assert caplog.messages == ["Raising stopped recording at step 0: can't start new thread"]


def test_only_the_main_rank_records(tmp_path: Path) -> None:
    logger, sink = Logger(60.0, is_main=False), JsonlSink(tmp_path / "m", tmp_path / "s")
    logger.attach(sink)
    for event in EVENTS:
        logger.write(event)
    logger.detach(sink)
    logger.close(None)
    assert list(tmp_path.iterdir()) == []
