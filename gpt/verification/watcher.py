"""Status of a run, read from its folder while it trains."""

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gpt.checkpoint.manifest import VAL_LOSS
from gpt.checkpoint.run_folder import RunFolder
from gpt.utils.atomic_io import is_leftover

TRAIN_LOSS = "train/loss"


@dataclass(frozen=True)
class RunStatus:
    """Status of a run at one moment."""

    started: bool
    """True once this launch has loaded its checkpoint; the metrics are then its own."""
    step: int
    """Last step that was logged; 0 before the first."""
    evaluated_step: int
    """Last step whose evaluation was logged; 0 before the first."""
    saving: bool
    """True while a checkpoint is written or an old one is removed."""
    committed_step: int
    """Step of the newest checkpoint; 0 if there is none."""


class RunWatcher:
    """Reader of a run's status during one launch.

    A launch that resumes first drops the records past its checkpoint from metrics.jsonl, and then adds a line to
    lineage.jsonl. Until that line is there, metrics.jsonl belongs to the launch before.
    """

    def __init__(self, folder: RunFolder):
        self._folder = folder
        self._n_starts = self._count_starts()
        self._started = False
        self._metrics_file, self._offset = (0, 0), 0
        self._step = self._evaluated_step = 0

    def read_status(self) -> RunStatus:
        """Return the status of the run now."""
        self._started = self._started or self._count_starts() > self._n_starts
        if self._started:
            self._read_new_metrics()
        paths = self._list_checkpoints()
        steps = [int(number) for path in paths if (number := path.name.removeprefix("step_")).isdecimal()]
        saving = any(is_leftover(path) for path in paths)
        return RunStatus(self._started, self._step, self._evaluated_step, saving, max(steps, default=0))

    def _count_starts(self) -> int:
        try:
            return self._folder.lineage.read_bytes().count(b"\n")
        except FileNotFoundError:
            return 0

    def _list_checkpoints(self) -> list[Path]:
        try:
            return list(self._folder.checkpoints.iterdir())
        except FileNotFoundError:
            return []

    def _read_new_metrics(self) -> None:
        """Read the new lines of metrics.jsonl, or all lines if the file was replaced."""
        try:
            with self._folder.metrics.open("rb") as stream:
                info = os.fstat(stream.fileno())
                metrics_file = (info.st_dev, info.st_ino)
                if metrics_file != self._metrics_file:
                    self._metrics_file, self._offset, self._step, self._evaluated_step = metrics_file, 0, 0, 0
                if info.st_size == self._offset:
                    return
                stream.seek(self._offset)
                complete_lines, newline, _ = stream.read().rpartition(b"\n")
        except FileNotFoundError:
            return
        self._offset += len(complete_lines) + len(newline)
        for line in complete_lines.splitlines():
            self._update_steps(json.loads(line))

    def _update_steps(self, record: dict[str, Any]) -> None:
        if TRAIN_LOSS in record:
            self._step = record["step"]
        if VAL_LOSS in record:
            self._evaluated_step = record["step"]
