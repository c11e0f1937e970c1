"""What a run is at, told from its folder by somebody who looks at it while it trains."""

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gpt.checkpoint.manifest import VAL_LOSS
from gpt.checkpoint.run_folder import RunFolder
from gpt.utils.atomic_io import is_leftover

LOSS = "train/loss"


@dataclass(frozen=True)
class RunStatus:
    """A look at a run's folder."""

    begun: bool
    """This life has read what it continues from."""
    step: int
    """Last step that was reported; 0 before the first."""
    evaluated: int
    """Last step whose evaluation was recorded."""
    saving: bool
    """A checkpoint is being written, or an old one removed."""
    committed: int
    """Step of the newest checkpoint; 0 where there is none."""


class Watch:
    """Follows one life of a run.

    A life that continues strikes out of metrics.jsonl what lies past its checkpoint, and then adds a line to
    lineage.jsonl: what metrics.jsonl holds before that is of the life before it.
    """

    def __init__(self, folder: RunFolder):
        self._folder = folder
        self._starts = self._count_starts()
        self._begun = False
        self._file, self._offset = (0, 0), 0
        self._step = self._evaluated = 0

    def look(self) -> RunStatus:
        """What can be seen now."""
        self._begun = self._begun or self._count_starts() > self._starts
        if self._begun:
            self._read_on()
        found = self._checkpoints()
        steps = [int(number) for path in found if (number := path.name.removeprefix("step_")).isdecimal()]
        saving = any(is_leftover(path) for path in found)
        return RunStatus(self._begun, self._step, self._evaluated, saving, max(steps, default=0))

    def _count_starts(self) -> int:
        try:
            return self._folder.lineage.read_bytes().count(b"\n")
        except FileNotFoundError:
            return 0

    def _checkpoints(self) -> list[Path]:
        try:
            return list(self._folder.checkpoints.iterdir())
        except FileNotFoundError:
            return []

    def _read_on(self) -> None:
        """Take up the lines of metrics.jsonl that are new, or all where it was replaced."""
        try:
            with self._folder.metrics.open("rb") as stream:
                found = os.fstat(stream.fileno())
                file = (found.st_dev, found.st_ino)
                if file != self._file:
                    self._file, self._offset, self._step, self._evaluated = file, 0, 0, 0
                if found.st_size == self._offset:
                    return
                stream.seek(self._offset)
                whole, newline, _ = stream.read().rpartition(b"\n")
        except FileNotFoundError:
            return
        self._offset += len(whole) + len(newline)
        for line in whole.splitlines():
            self._take(json.loads(line))

    def _take(self, record: dict[str, Any]) -> None:
        if LOSS in record:
            self._step = record["step"]
        if VAL_LOSS in record:
            self._evaluated = record["step"]
