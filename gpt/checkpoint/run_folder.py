"""The folder of a run: what lies where, and whether a configuration may go on in it.

config.json  environment.json  tokenizer.json  metrics.jsonl  samples.jsonl  checkpoints/step_XXXXXXXX/
and, where steps were profiled, trace.json
"""

import re
from collections.abc import Mapping, Set
from pathlib import Path

from gpt.checkpoint.store import MANIFEST, PROGRESS, read_json
from gpt.configs.cli import load_config
from gpt.configs.gpt_config import GPTConfig
from gpt.configs.train_config import TrainConfig
from gpt.errors import UserError

NOT_OF_WEIGHTS = frozenset({"vocab_size", "dropout"})
"""Fields of a model that trained weights do not depend on; the vocabulary is compared as the tokenizer's."""


class RunFolder:
    """Paths in a run's folder."""

    def __init__(self, path: Path):
        self.path = path
        self.config = path / "config.json"
        self.environment = path / "environment.json"
        self.tokenizer = path / "tokenizer.json"
        self.metrics = path / "metrics.jsonl"
        self.samples = path / "samples.jsonl"
        self.trace = path / "trace.json"
        self.checkpoints = path / "checkpoints"

    def checkpoint_at(self, step: int) -> Path:
        """Where the checkpoint of `step` lies or will lie."""
        return self.checkpoints / f"step_{step:08d}"

    def committed(self) -> list[Path]:
        """Checkpoints, oldest first."""
        if not self.checkpoints.is_dir():
            return []
        found = (
            path
            for path in self.checkpoints.iterdir()
            if re.fullmatch(r"step_\d{8,}", path.name) and (path / MANIFEST).exists()
        )
        return sorted(found, key=lambda path: int(path.name.removeprefix("step_")))

    def origin(self, config: TrainConfig) -> Path | None:
        """The checkpoint that a run of `config` continues from; None where it starts afresh.

        Raises:
            UserError: the folder holds a run that `config` may not continue, or `--resume` names no checkpoint.
        """
        own = self.committed()
        if not self.config.exists():
            if own or self.metrics.exists():
                raise UserError(f"--run-dir {self.path} holds a run without its config.json; name another --run-dir")
            return self._fork(config)
        if config.resume == "never":
            raise UserError(f"--run-dir {self.path} holds a run; --resume auto continues it, or name another --run-dir")
        saved = load_config(self.config)
        if _names_a_checkpoint(config) and not _is_start_of(config.resume, saved.resume):
            raise UserError(
                f"--run-dir {self.path} holds a run that did not start from {config.resume}; name another --run-dir"
            )
        # Where a run took its first weights need not be told again once it has a checkpoint of its own.
        told_before = {"init_from"} if own and config.init_from is None else set()
        _require_same(config, saved, f"--run-dir {self.path}", ignored=told_before)
        return own[-1] if own else self._fork(saved)

    def to_record(self, config: TrainConfig, origin: Path | None) -> TrainConfig:
        """The configuration that config.json should hold: it keeps where the run began, to the checkpoint."""
        if self.config.exists():
            saved = load_config(self.config)
            return config.model_copy(update={"resume": saved.resume, "init_from": saved.init_from})
        began = str(origin.resolve()) if origin else "auto"
        return config.model_copy(update={"resume": began})

    def _fork(self, config: TrainConfig) -> Path | None:
        """The checkpoint of another run that this one starts from."""
        if not _names_a_checkpoint(config):
            return None
        checkpoint = locate_checkpoint(Path(config.resume), "--resume")
        saved = load_config(checkpoint / "config.json")
        _require_same(config, saved, f"--resume {checkpoint}", ignored={"init_from"})
        return checkpoint


def locate_checkpoint(path: Path, flag: str) -> Path:
    """A checkpoint folder, given itself or its run's folder, of which the newest is taken.

    Raises:
        UserError: there is none.
    """
    if (path / MANIFEST).exists():
        return path
    committed = RunFolder(path).committed()
    if not committed:
        reason = "holds no checkpoint" if path.exists() else "no such folder"
        raise UserError(f"{flag} {path}: {reason}; name a run's folder or one of its checkpoints/step_XXXXXXXX")
    return committed[-1]


def run_of(checkpoint: Path) -> RunFolder:
    """The run that a checkpoint belongs to."""
    return RunFolder(checkpoint.resolve().parent.parent)


def require_same_architecture(config: TrainConfig, checkpoint: Path) -> None:
    """Compare `--init-from`'s model with the configuration's, in all that decides what its weights mean.

    Raises:
        UserError: names the first that differs.
    """
    saved = load_config(checkpoint / "config.json").model
    for name in GPTConfig.model_fields:
        there, here = getattr(saved, name), getattr(config.model, name)
        if there != here and name not in NOT_OF_WEIGHTS:
            flag = f"--model.{name.replace('_', '-')}"
            raise UserError(
                f"--init-from {checkpoint} is of another architecture: {flag} is {there} there and {here} here"
            )


def require_same_identity(identity: Mapping[str, str | int], checkpoint: Path, names: Set[str]) -> None:
    """Compare what a checkpoint's run resolved from its corpus and machine with what this one did.

    Raises:
        UserError: names the first of `names` that differs.
    """
    saved = read_json(checkpoint / PROGRESS).get("identity", {})
    for name in identity:
        if name in names and saved.get(name, identity[name]) != identity[name]:  # a former mode may resolve less
            raise UserError(
                f"{checkpoint} cannot be continued: {name} is {saved.get(name)} there and {identity[name]} here; "
                "restore what was changed, or name another --run-dir"
            )


def _is_start_of(given: str, saved: str) -> bool:
    """Whether the checkpoint `saved` is what `given` names: itself, or a run's folder that it lies in."""
    return Path(given).resolve() in (Path(saved), *Path(saved).parents)


def _names_a_checkpoint(config: TrainConfig) -> bool:
    return config.resume not in ("auto", "never")


def _require_same(config: TrainConfig, saved: TrainConfig, place: str, ignored: Set[str]) -> None:
    differences = {name: pair for name, pair in saved.differences(config).items() if name not in ignored}
    if differences:
        name, (there, here) = next(iter(differences.items()))
        more = f" (and {len(differences) - 1} more)" if len(differences) > 1 else ""
        raise UserError(
            f"{place} holds a run of another configuration: {name} is {there} there and {here} here{more}; "
            "take the same values or another --run-dir"
        )
