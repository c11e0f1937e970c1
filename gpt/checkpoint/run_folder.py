"""The folder of a run: what lies where, and whether a configuration may go on in it.

config.json  environment.json  tokenizer.json  metrics.jsonl  samples.jsonl  checkpoints/step_XXXXXXXX/
"""

import re
from pathlib import Path

from gpt.configs.cli import load_config
from gpt.configs.train_config import TrainConfig
from gpt.errors import UserError


class RunFolder:
    """Paths in a run's folder."""

    def __init__(self, path: Path):
        self.path = path
        self.config = path / "config.json"
        self.environment = path / "environment.json"
        self.tokenizer = path / "tokenizer.json"
        self.metrics = path / "metrics.jsonl"
        self.samples = path / "samples.jsonl"
        self.checkpoints = path / "checkpoints"

    def checkpoint_at(self, step: int) -> Path:
        """Where the checkpoint of `step` lies or will lie."""
        return self.checkpoints / f"step_{step:08d}"

    def committed(self) -> list[Path]:
        """Checkpoints, oldest first."""
        if not self.checkpoints.is_dir():
            return []
        found = (path for path in self.checkpoints.iterdir() if re.fullmatch(r"step_\d{8,}", path.name))
        return sorted(found, key=lambda path: int(path.name.removeprefix("step_")))

    def origin(self, config: TrainConfig) -> Path | None:
        """The checkpoint that a run of `config` continues from; None where it starts afresh.

        Raises:
            UserError: the folder holds a run that `config` may not continue, or `--resume` names no checkpoint.
        """
        named = None if config.resume in ("auto", "never") else locate_checkpoint(Path(config.resume), "--resume")
        if not self.config.exists():
            if named is not None:
                _require_same(config, load_config(named / "config.json"), str(named))
            return named
        if config.resume == "never":
            raise UserError(f"--run-dir {self.path} holds a run; --resume auto continues it, or name another --run-dir")
        saved = load_config(self.config)
        _require_same(config, saved, f"--run-dir {self.path}")
        if named is not None and saved.resume != config.resume:
            raise UserError(
                f"--run-dir {self.path} holds a run that did not start from {config.resume}; name another --run-dir"
            )
        own = self.committed()
        return own[-1] if own else named


def locate_checkpoint(path: Path, flag: str) -> Path:
    """A checkpoint folder, given itself or its run's folder, of which the newest is taken.

    Raises:
        UserError: there is none.
    """
    if (path / "manifest.json").exists():
        return path
    committed = RunFolder(path).committed()
    if not committed:
        reason = "holds no checkpoint" if path.exists() else "no such folder"
        raise UserError(f"{flag} {path}: {reason}; name a run's folder or one of its checkpoints/step_XXXXXXXX")
    return committed[-1]


def run_of(checkpoint: Path) -> RunFolder:
    """The run that a checkpoint belongs to."""
    return RunFolder(checkpoint.resolve().parent.parent)


def _require_same(config: TrainConfig, saved: TrainConfig, place: str) -> None:
    differences = saved.differences(config)
    if differences:
        name, (there, here) = next(iter(differences.items()))
        more = f" (and {len(differences) - 1} more)" if len(differences) > 1 else ""
        raise UserError(
            f"{place} holds a run of another configuration: {name} is {there} there and {here} here{more}; "
            "take the same values or another --run-dir"
        )
