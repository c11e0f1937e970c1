"""The folder of a run and the paths in it.

config.json  environment.json  lineage.jsonl  tokenizer.json  metrics.jsonl  samples.jsonl  checkpoints/step_XXXXXXXX/
and trace.json of a run that profiled steps, journal.jsonl of one that skipped batches
"""

import os
import re
from pathlib import Path
from typing import Any

from gpt.checkpoint.manifest import CHECKPOINT_MANIFEST, VAL_LOSS
from gpt.configs.load import load_config
from gpt.configs.train_config import TrainConfig
from gpt.errors import UserError
from gpt.utils.atomic_io import fsync, read_jsonl
from gpt.utils.helper import unique_names

DAMAGED = ".damaged"
"""Suffix of a damaged checkpoint, which was moved aside when its run resumed from an earlier one."""


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

    def checkpoint_path(self, step: int) -> Path:
        """Return the path of the checkpoint of `step`, whether it exists or not."""
        return self.checkpoints / f"step_{step:08d}"

    def list_step_folders(self) -> list[Path]:
        """Return the folders with the name of a checkpoint, oldest first, whether they hold one or not."""
        if not self.checkpoints.is_dir():
            return []
        found = (path for path in self.checkpoints.iterdir() if re.fullmatch(r"step_\d{8,}", path.name))
        return sorted(found, key=parse_step)

    def list_checkpoints(self) -> list[Path]:
        """Return the checkpoints, oldest first."""
        return [path for path in self.list_step_folders() if (path / CHECKPOINT_MANIFEST).exists()]

    def has_evaluation(self, step: int) -> bool:
        """Return whether metrics.jsonl holds an evaluation of `step`."""
        records = read_jsonl(self.metrics)
        return any(record.get("step") == step and VAL_LOSS in record for record in records)

    def read_origin_step(self) -> int | None:
        """Return the step that the run's first launch started from; None before it."""
        first: dict[str, Any] = next(read_jsonl(self.lineage), {})
        step = first.get("step")
        return step if isinstance(step, int) else None

    def move_aside(self, checkpoint: Path) -> Path:
        """Rename a damaged checkpoint, so that its step can be saved again, and return its new path.

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

    def record_origin(self, config: TrainConfig, origin: Path | None) -> TrainConfig:
        """Return the configuration for config.json, which names the checkpoint that the run started from.

        Args:
            config: the configuration of this launch.
            origin: the checkpoint that this launch starts from.
        """
        if self.config.exists():
            saved = load_config(self.config)
            return config.model_copy(update={"resume": saved.resume, "init_from": saved.init_from})
        return config.model_copy(update={"resume": str(_make_absolute(origin)) if origin else "auto"})


def parse_step(checkpoint: Path) -> int:
    """Return the step in a checkpoint's name."""
    return int(checkpoint.name.removeprefix("step_"))


def locate_checkpoint(path: Path, flag: str) -> Path:
    """Return a checkpoint, given its folder, or its run's folder for the newest one.

    Args:
        path: a checkpoint or a run's folder.
        flag: the option that names it, for messages.

    Raises:
        UserError: there is none.
    """
    if (path / CHECKPOINT_MANIFEST).exists():
        return path
    folder = RunFolder(path)
    committed = folder.list_checkpoints()
    if not committed:
        reason = "holds no checkpoint" if path.exists() else "no such folder"
        if folder.tokenizer.is_file() and [*path.glob("*.safetensors"), *path.glob("*.bin")]:
            raise UserError(f"{flag} {path}: a model from elsewhere; import it first: gpt import {path} --out RUN_DIR")
        raise UserError(f"{flag} {path}: {reason}; name a run's folder or one of its checkpoints/step_XXXXXXXX")
    return committed[-1]


def find_run(checkpoint: Path) -> RunFolder:
    """Return the run that a checkpoint belongs to: the folder with a config.json above it.

    The folder `checkpoints` may be a link to another disk, so the path is tried as it is before its links are followed.
    """
    runs = [RunFolder(path.parent.parent) for path in (_make_absolute(checkpoint), checkpoint.resolve())]
    return next((run for run in runs if run.config.exists()), runs[-1])


def no_run_error(path: Path) -> UserError:
    """Return the error for a RUN_DIR on the command line that is no folder of a run."""
    reason = "not a run: it has no config.json" if path.is_dir() else "no such folder"
    return UserError(f"RUN_DIR {path}: {reason}; name the --run-dir of a run")


def _make_absolute(path: Path) -> Path:
    """Return the absolute path without `..`, and with its links."""
    return Path(os.path.abspath(path))  # noqa: PTH100 - Path.resolve follows links
