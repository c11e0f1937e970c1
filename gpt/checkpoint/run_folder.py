"""The folder of a run: what lies where.

config.json  environment.json  lineage.jsonl  tokenizer.json  metrics.jsonl  samples.jsonl  checkpoints/step_XXXXXXXX/
and, where steps were profiled, trace.json; where batches were left out, journal.jsonl
"""

import re
from pathlib import Path

from gpt.checkpoint.manifest import CHECKPOINT_MANIFEST, VAL_LOSS
from gpt.configs.load import load_config
from gpt.configs.train_config import TrainConfig
from gpt.errors import UserError
from gpt.utils.atomic_io import fsync, read_jsonl
from gpt.utils.helper import unique_names

DAMAGED = ".damaged"
"""Ending of a checkpoint that was not whole when its run was continued from an earlier one."""


class RunFolder:
    """Paths in a run's folder."""

    def __init__(self, path: Path):
        self.path = path
        self.config = path / "config.json"
        self.environment = path / "environment.json"
        self.lineage = path / "lineage.jsonl"
        self.tokenizer = path / "tokenizer.json"
        self.metrics = path / "metrics.jsonl"
        self.samples = path / "samples.jsonl"
        self.journal = path / "journal.jsonl"
        self.trace = path / "trace.json"
        self.checkpoints = path / "checkpoints"

    def checkpoint_at(self, step: int) -> Path:
        """Where the checkpoint of `step` lies or will lie."""
        return self.checkpoints / f"step_{step:08d}"

    def steps(self) -> list[Path]:
        """Folders with the name of a checkpoint, oldest first, whether they hold one or not."""
        if not self.checkpoints.is_dir():
            return []
        found = (path for path in self.checkpoints.iterdir() if re.fullmatch(r"step_\d{8,}", path.name))
        return sorted(found, key=step_of)

    def committed(self) -> list[Path]:
        """Checkpoints, oldest first."""
        return [path for path in self.steps() if (path / CHECKPOINT_MANIFEST).exists()]

    def evaluated_at(self, step: int) -> bool:
        """Whether metrics.jsonl holds an evaluation of `step`."""
        records = read_jsonl(self.metrics)
        return any(record.get("step") == step and VAL_LOSS in record for record in records)

    def move_aside(self, checkpoint: Path) -> Path:
        """Rename a checkpoint so that it is none any more and its step can be saved again; returns where it lies.

        Raises:
            UserError: the disk refused.
        """
        taken = [path.name for path in self.checkpoints.iterdir()]
        unused = checkpoint.with_name(unique_names([*taken, f"{checkpoint.name}{DAMAGED}"])[-1])
        try:
            checkpoint.rename(unused)
            fsync(checkpoint.parent)
        except OSError as error:
            raise UserError(f"{checkpoint}: cannot be renamed to {unused.name}: {error.strerror}") from error
        return unused

    def to_record(self, config: TrainConfig, origin: Path | None) -> TrainConfig:
        """The configuration that config.json should hold: it keeps where the run began, to the checkpoint."""
        if self.config.exists():
            saved = load_config(self.config)
            return config.model_copy(update={"resume": saved.resume, "init_from": saved.init_from})
        began = str(origin.resolve()) if origin else "auto"
        return config.model_copy(update={"resume": began})


def step_of(checkpoint: Path) -> int:
    """The step of a checkpoint, by its name."""
    return int(checkpoint.name.removeprefix("step_"))


def locate_checkpoint(path: Path, flag: str) -> Path:
    """A checkpoint folder, given itself or its run's folder, of which the newest is taken.

    Raises:
        UserError: there is none.
    """
    if (path / CHECKPOINT_MANIFEST).exists():
        return path
    committed = RunFolder(path).committed()
    if not committed:
        reason = "holds no checkpoint" if path.exists() else "no such folder"
        raise UserError(f"{flag} {path}: {reason}; name a run's folder or one of its checkpoints/step_XXXXXXXX")
    return committed[-1]


def run_of(checkpoint: Path) -> RunFolder:
    """The run that a checkpoint belongs to."""
    return RunFolder(checkpoint.resolve().parent.parent)
