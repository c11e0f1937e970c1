"""The sink that writes metrics.jsonl and samples.jsonl, one JSON object a line."""

import contextlib
import json
import logging
import math
import os
import time
from collections import deque
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from gpt.training.events import EvalEnd, Event, MetricsReady, RolledBack, SpikeSeen, TextSampled
from gpt.training.observer import Sink
from gpt.utils.atomic_io import truncate_jsonl
from gpt.utils.helper import plural

log = logging.getLogger(__name__)

MAX_WAITING_RECORDS = 10_000
"""Records of a file that wait in memory for a disk that refuses them."""


class JsonlSink(Sink):
    """Appends metrics and samples; a number that JSON lacks (NaN, inf) is written as null.

    The files are the record of a run. What the disk refuses waits in memory, and is written before any later record.

    Args:
        metrics: file of the metrics.
        samples: file of the samples.
        clock: seconds since 1970-01-01 UTC.
    """

    events: tuple[type[Event], ...] = (MetricsReady, EvalEnd, SpikeSeen, RolledBack, TextSampled)
    is_essential = True

    def __init__(self, metrics: Path, samples: Path, clock: Callable[[], float] = time.time):
        self._metrics, self._samples = RecordFile(metrics), RecordFile(samples)
        self._clock = clock

    def write(self, event: Event) -> None:
        """Append a line per report, evaluation, spike or sample; a rollback removes the lines after its step."""
        match event:
            case MetricsReady(step=step, metrics=metrics):
                self._append(step, {"time": self._clock(), **metrics})
            case EvalEnd(step=step, metrics=metrics):
                self._append(step, metrics)
            case SpikeSeen(step=step, loss=loss, median=median, deviations=deviations):
                numbers = {"spike/loss": loss, "spike/median": median, "spike/deviations": deviations}
                self._append(step, numbers)
            case RolledBack(to_step=to_step):
                for records in (self._metrics, self._samples):
                    records.truncate(to_step)
            case TextSampled(step=step, prompt=prompt, text=text):
                self._samples.append({"step": step, "prompt": prompt, "text": text})

    def flush(self) -> None:
        """Write the records that wait, as far as the disk takes them."""
        for records in (self._metrics, self._samples):
            records.flush()

    def close(self, error: BaseException | None) -> None:
        """Write the records that wait.

        Raises:
            OSError: the disk still refuses some; says how many.
        """
        self.flush()
        losses = [loss for records in (self._metrics, self._samples) if (loss := records.describe_loss())]
        if losses:
            raise OSError("; ".join(losses))

    def _append(self, step: int, metrics: Mapping[str, float]) -> None:
        numbers = {name: value if math.isfinite(value) else None for name, value in metrics.items()}
        self._metrics.append({"step": step, **numbers})


class RecordFile:
    """A JSONL file whose records are written in order, each once, although the disk may refuse a write at any time.

    Args:
        path: the file, made with the first record.
    """

    def __init__(self, path: Path):
        self._path = path
        self._waiting: deque[tuple[int, bytes]] = deque()
        self._to_step: int | None = None
        self._n_lost = 0
        self._failure: OSError | None = None
        self._size_before_failure: int | None = None

    def append(self, record: dict[str, Any]) -> None:
        """Add a record with a step, and write it if the disk takes it."""
        if len(self._waiting) == MAX_WAITING_RECORDS:
            self._waiting.popleft()
            self._n_lost += 1
        line = json.dumps(record, ensure_ascii=False) + "\n"
        self._waiting.append((record["step"], line.encode(errors="backslashreplace")))
        self.flush()

    def truncate(self, step: int) -> None:
        """Drop the records after a step, those that wait included."""
        self._waiting = deque((at, line) for at, line in self._waiting if at <= step)
        self._to_step = step if self._to_step is None else min(step, self._to_step)
        self.flush()

    def flush(self) -> None:
        """Write what waits; if the disk refuses, keep it and warn once."""
        try:
            if self._size_before_failure is not None:  # the write that failed may have left a part of a line
                with contextlib.suppress(FileNotFoundError):
                    os.truncate(self._path, self._size_before_failure)
                self._size_before_failure = None
            if self._to_step is not None:
                truncate_jsonl(self._path, self._to_step)
                self._to_step = None
            if self._waiting:
                self._write_waiting()
        except OSError as error:
            if self._failure is None:
                log.warning("%s: %s; records wait in memory until it can be written", self._path, error.strerror)
            self._failure = error
        else:
            if self._failure is not None:
                log.warning("%s can be written again", self._path)
            self._failure = None

    def describe_loss(self) -> str:
        """Return a line on the records that are not in the file; empty if all of them are."""
        n_lost = self._n_lost + len(self._waiting)
        if not n_lost and self._to_step is None:
            return ""
        reason = self._failure.strerror if self._failure else "too many waited for the disk"
        what = plural(n_lost, "record") if n_lost else "a rollback"
        return f"{self._path}: {what} could not be written: {reason}"

    def _write_waiting(self) -> None:
        """Append each line that waits; a line leaves the queue once all of it is in the file."""
        descriptor = os.open(self._path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | getattr(os, "O_BINARY", 0), 0o666)
        try:
            while self._waiting:
                _, line = self._waiting[0]
                self._size_before_failure = os.fstat(descriptor).st_size
                written = 0
                while written < len(line):
                    written += os.write(descriptor, line[written:])
                self._size_before_failure = None
                self._waiting.popleft()
        finally:
            os.close(descriptor)
