import json
import logging
import os
import signal
import threading
import time
from pathlib import Path

import pytest

from gpt.configs.gpt_config import GPTConfig
from gpt.configs.lr_config import LRConfig
from gpt.configs.run_plan import CorpusFacts, MachineFacts, StreamFacts, resolve
from gpt.configs.train_config import TrainConfig
from gpt.training.events import (
    CheckpointSaved,
    EvalEnd,
    Event,
    MetricsReady,
    RolledBack,
    SpikeSeen,
    StepEnd,
    TextSampled,
    TrainEnd,
    TrainStart,
)
from gpt.training.logger import Logger
from gpt.training.observer import Sink
from gpt.training.sinks.jsonl import JsonlSink

PLAN = resolve(
    TrainConfig(max_steps=20, tokens_per_step=4096, model=GPTConfig(block_size=256), lr=LRConfig(schedule="cosine")),
    MachineFacts("cpu", "a CPU", has_bfloat16=False),
    CorpusFacts(300, (StreamFacts("text", 10**6),), val_tokens=10, val_bytes=30, xz_bits_per_byte=1.75),
)
METRICS = {"train/loss": 2.5, "grad_norm": 1.0, "tokens_per_second": 2048.0, "mfu": 0.456, "lr": 1e-3, "tokens": 40960}
EVENTS: list[Event] = [
    TrainStart(0, PLAN, "runs/a/checkpoints/step_00000005"),
    MetricsReady(10, METRICS, (2.6, 2.5)),
    StepEnd(10, 40960),
    EvalEnd(10, "val", {"val/loss": 2.0, "val/perplexity": 7.389, "val/bpb": 1.5}),
    TextSampled(10, "def", " main():\n\x1b[31mred"),
    CheckpointSaved(10, "runs/a/checkpoints/step_00000010"),
    TrainEnd(20, "finished"),
]
TROUBLE: list[Event] = [
    MetricsReady(10, METRICS, (2.5,)),
    TextSampled(10, "def", " main()"),
    MetricsReady(12, METRICS | {"train/loss": float("nan")}, (float("nan"),) * 2, (11, 12)),
    SpikeSeen(12, 25.0, 2.5, float("inf")),
    TextSampled(12, "def", " main()"),
    RolledBack(12, 10, "the loss of step 12 was 25.0"),
]


def test_metrics_and_samples_are_written_as_json_lines(tmp_path: Path) -> None:
    sink = JsonlSink(tmp_path / "metrics.jsonl", tmp_path / "samples.jsonl", clock=lambda: 1.5e9)
    for event in [*EVENTS, EvalEnd(20, "val", {"val/loss": float("nan")})]:
        sink.write(event)
    metrics = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert metrics == [
        {"step": 10, "time": 1.5e9} | METRICS,
        {"step": 10, "val/loss": 2.0, "val/perplexity": 7.389, "val/bpb": 1.5},
        {"step": 20, "val/loss": None},
    ]
    samples = [json.loads(line) for line in (tmp_path / "samples.jsonl").read_text().splitlines()]
    assert samples == [{"step": 10, "prompt": "def", "text": " main():\n\x1b[31mred"}]


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


def test_spikes_skipped_updates_and_rollbacks_are_recorded(tmp_path: Path) -> None:
    files = JsonlSink(tmp_path / "metrics.jsonl", tmp_path / "samples.jsonl")
    for event in TROUBLE[:-1]:
        files.write(event)
    spike = json.loads((tmp_path / "metrics.jsonl").read_text().splitlines()[-1])
    assert spike == {"step": 12, "spike/loss": 25.0, "spike/median": 2.5, "spike/deviations": None}
    files.write(TROUBLE[-1])
    for name in ("metrics.jsonl", "samples.jsonl"):
        (record,) = (json.loads(line) for line in (tmp_path / name).read_text().splitlines())
        assert record["step"] == 10
