import errno
import json
import os
import threading
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from gpt.commands.train import run as train
from gpt.configs.train_config import TrainConfig
from gpt.pipeline import build_trainer
from gpt.run import open_run
from gpt.training.events import EvalEnd, Event, MetricsReady, RolledBack, StepEnd, TextSampled
from gpt.training.logger import Logger
from gpt.training.observer import Sink
from gpt.training.sinks import jsonl
from gpt.training.sinks.jsonl import JsonlSink
from tests.conftest import LossRecorder, limit_file_size
from tests.training.example_events import EVENTS, METRICS, TROUBLE

Configure = Callable[..., TrainConfig]
ERRORS = [errno.ENOSPC, errno.EMFILE, errno.EIO, errno.EAGAIN, errno.EDQUOT, errno.EROFS]


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


class Disk:
    """Replaces system calls of the sink; `failing` calls in a row are refused, after a part of the line was written."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, code: int):
        self._code, self.failing = code, 0
        self._open, self._write = os.open, os.write
        monkeypatch.setattr(jsonl, "os", SimpleNamespace(**vars(os) | {"open": self.open, "write": self.write}))

    def open(self, path: Any, *args: Any) -> int:
        if self.failing and self._code == errno.EMFILE and str(path).endswith(".jsonl"):
            self._fail()
        return self._open(path, *args)

    def write(self, descriptor: int, data: bytes) -> int:
        if self.failing and self._code != errno.EMFILE:
            self._write(descriptor, data[: len(data) // 2])
            self._fail()
        return self._write(descriptor, data[:7])  # a short write is no error

    def _fail(self) -> None:
        self.failing -= 1
        raise OSError(self._code, os.strerror(self._code))


def make_sink(folder: Path) -> JsonlSink:
    return JsonlSink(folder / "metrics.jsonl", folder / "samples.jsonl")


def read_steps(path: Path) -> list[int]:
    return [json.loads(line)["step"] for line in path.read_text().splitlines()]


def report(step: int) -> MetricsReady:
    return MetricsReady(step, {"train/loss": 1.0 / step}, (1.0 / step,))


@pytest.mark.parametrize("code", ERRORS)
@pytest.mark.parametrize("n_failures", [1, 3])
def test_refused_records_are_written_later_in_order_and_once(
    code: int, n_failures: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    disk, sink = Disk(monkeypatch, code), make_sink(tmp_path)
    for step in range(1, 11):
        disk.failing = n_failures if step == 4 else disk.failing
        sink.write(report(step))
        sink.write(TextSampled(step, "a", "b"))
    sink.close(None)
    assert read_steps(tmp_path / "metrics.jsonl") == list(range(1, 11))
    assert read_steps(tmp_path / "samples.jsonl") == list(range(1, 11))
    assert os.strerror(code) in caplog.messages[0]
    assert "records wait in memory" in caplog.messages[0]
    assert len(caplog.messages) <= 4  # one warning and one notice for each file


def test_rollback_drops_waiting_and_written_records_although_the_disk_refuses(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    disk, sink = Disk(monkeypatch, errno.ENOSPC), make_sink(tmp_path)
    for step in range(1, 7):
        sink.write(report(step))
    disk.failing = 100
    sink.write(report(7))
    with monkeypatch.context() as patch:
        patch.setattr(jsonl, "truncate_jsonl", lambda *_: disk._fail())
        sink.write(RolledBack(7, 4, "a spike"))
        sink.write(report(5))
    disk.failing = 0
    sink.write(report(6))
    sink.close(None)
    assert read_steps(tmp_path / "metrics.jsonl") == [1, 2, 3, 4, 5, 6]


def test_number_of_waiting_records_is_bounded_and_losses_are_counted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(jsonl, "MAX_WAITING_RECORDS", 5)
    disk, sink = Disk(monkeypatch, errno.ENOSPC), make_sink(tmp_path)
    disk.failing = 10**6
    for step in range(1, 9):
        sink.write(report(step))
    with pytest.raises(OSError, match=r"metrics\.jsonl: 8 records could not be written: No space left"):
        sink.close(None)
    disk.failing = 0
    with pytest.raises(OSError, match=r"metrics\.jsonl: 3 records could not be written: too many waited"):
        sink.close(None)
    assert read_steps(tmp_path / "metrics.jsonl") == [4, 5, 6, 7, 8]


def test_essential_sink_that_blocks_writes_everything_once_it_can(caplog: pytest.LogCaptureFixture) -> None:
    class Hanging(Sink):
        is_essential = True

        def __init__(self) -> None:
            self.released, self.steps = threading.Event(), list[int]()

        def write(self, event: Event) -> None:
            self.released.wait(10)
            self.steps.append(event.step)

    logger, sink = Logger(0.1), Hanging()
    logger.attach(sink)
    for step in range(5):
        logger.write(Event(step))
    assert len(caplog.messages) == 1
    threading.Timer(0.02, sink.released.set).start()
    logger.close(None)
    assert sink.steps == [0, 1, 2, 3, 4]
    assert not logger.is_incomplete


def test_run_with_one_refused_write_has_every_record(
    tiny: Configure, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Breaker(LossRecorder):
        def on_event(self, event: Any) -> tuple[()]:
            if isinstance(event, StepEnd) and event.step in (2, 5):
                disk.failing = 1
            return super().on_event(event)

    disk = Disk(monkeypatch, errno.EIO)
    trainer = build_trainer(open_run(tiny(tmp_path, checkpoint={"interval": 3})))
    trainer.attach(Breaker())
    assert trainer.train() == "finished"
    assert not trainer.is_record_incomplete
    steps = read_steps(tmp_path / "metrics.jsonl")
    assert sorted(set(steps)) == list(range(1, 9)) and len(steps) == 10  # two evaluations


def test_refused_records_are_written_before_a_checkpoint_commits(
    tiny: Configure, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    committed: list[list[int]] = []
    disk = Disk(monkeypatch, errno.ENOSPC)

    class Breaker(LossRecorder):
        def on_event(self, event: Any) -> tuple[()]:
            if isinstance(event, MetricsReady) and event.step == 3:
                disk.failing = 1
            return super().on_event(event)

    monkeypatch.setattr(
        "gpt.checkpoint.manager.write_checkpoint", lambda *_: committed.append(read_steps(tmp_path / "metrics.jsonl"))
    )
    checkpoint = {"interval": 3, "asynchronous": False, "keep": 0}
    trainer = build_trainer(open_run(tiny(tmp_path, max_steps=4, checkpoint=checkpoint, eval={"interval": 0})))
    trainer.attach(Breaker())
    trainer.train()
    assert committed[0] == [1, 2, 3]


def test_run_whose_records_never_reach_the_disk_says_so_and_exits_with_1(
    tiny: Configure, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    config = tiny(tmp_path / "run", max_steps=3, sample={"prompts": ()}, eval={"interval": 0})
    (tmp_path / "config.json").write_text(config.saved_json())
    disk = Disk(monkeypatch, errno.ENOSPC)
    disk.failing = 10**6
    assert train(["--config", str(tmp_path / "config.json")]) == 1
    (message,) = (record.getMessage() for record in caplog.records if record.levelname == "ERROR")
    assert message.startswith("the record of the run is incomplete: ")
    assert "metrics.jsonl: 4 records could not be written: No space left on device" in message


def test_limit_on_the_size_of_files_leaves_complete_lines(tmp_path: Path) -> None:
    sink = make_sink(tmp_path)
    with limit_file_size(100):
        for step in range(1, 11):
            sink.write(report(step))
        lines = (tmp_path / "metrics.jsonl").read_bytes()
        assert len(lines) <= 100
    sink.write(report(11))
    sink.close(None)
    assert read_steps(tmp_path / "metrics.jsonl") == list(range(1, 12))
