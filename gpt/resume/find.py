"""Find where a run starts: at step 0, from its own newest valid checkpoint, or from another run's checkpoint.

`claim_start` does all of it once, on rank 0. Nothing later loads the checkpoint's configuration or manifest again, or
hashes its files again.
"""

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from pydantic import Field

from gpt.checkpoint.manifest import (
    CHECKPOINT_MANIFEST,
    CONFIG,
    PROGRESS,
    VAL_LOSS,
    environment_mismatch,
)
from gpt.checkpoint.newest import find_newest_valid
from gpt.checkpoint.run_folder import RunFolder, locate_checkpoint
from gpt.configs.base import Config
from gpt.configs.load import load_config
from gpt.configs.train_config import NO_CHECKPOINT, TrainConfig
from gpt.data.prepare.sources import require_apart
from gpt.errors import UserError
from gpt.interop.imported_run import import_into_cache
from gpt.resume.compatibility import Difference, require_resumable, require_same_architecture
from gpt.resume.origin import find_origin
from gpt.utils.atomic_io import read_json, remove_leftovers, require_creatable, require_writable
from gpt.utils.folder_lock import lock_folder
from gpt.utils.helper import sha256_of_file

log = logging.getLogger(__name__)


class Start(Config):
    """The state that a run starts from; the default is step 0 with initial weights."""

    checkpoint: Path | None = None
    """Verified checkpoint to resume from."""
    init_from: Path | None = None
    """Checkpoint whose weights a run at step 0 starts with; also verified."""
    weights_note: str | None = None
    """Note for the plan: step and val/loss of the checkpoint of `init_from`."""
    is_fork: bool = False
    """The checkpoint is another run's."""
    step: int = 0
    is_evaluated: bool = False
    """metrics.jsonl holds the evaluation of this step."""
    saved: TrainConfig | None = None
    """Configuration in the checkpoint."""
    identity: dict[str, str | int] = Field(default_factory=dict)
    """`RunPlan.identity` in the checkpoint, or in that of `init_from`."""
    manifest_sha256: str | None = None
    """Digest of the checkpoint's manifest, and so of every file in it."""
    differences: tuple[Difference, ...] = ()
    """Fields that changed since the checkpoint was saved."""
    mismatch: str | None = None
    """Note for the plan: this process computes other last bits than the one that saved."""
    damaged: tuple[tuple[Path, str], ...] = ()
    """Newer checkpoints that are not valid, newest first, each with the reason."""
    moved_aside: tuple[Path, ...] = ()
    """Their paths after they were renamed."""

    @property
    def loads_weights(self) -> bool:
        """The run starts with weights from files, not with initial ones."""
        return self.checkpoint is not None or self.init_from is not None


@dataclass(frozen=True)
class _Candidates:
    """Checkpoints that a launch may start from."""

    paths: tuple[Path, ...] = ()
    """Oldest first; of a run's own the newest valid one is taken, a named one is the only one."""
    kind: Literal["own", "fork", "weights"] = "own"
    place: str = ""
    """Flag and path that lead to them, for messages."""
    is_named: bool = True
    """The user names one checkpoint."""


def claim_start(folder: RunFolder, config: TrainConfig, device: str, *, dry_run: bool) -> Start:
    """Lock the run's folder, clear what a killed run left in it, and find where the run starts; rank 0 does it.

    Damaged checkpoints are moved aside. A dry run looks at the folder and writes nothing.

    Raises:
        UserError: the folder is in use, or holds a run that `config` may not resume.
    """
    if not folder.config.exists():  # a run that has begun beside its texts may be resumed
        require_apart(folder.path, "--run-dir", (*config.data.source, *config.data.val_source))
    if dry_run:
        require_creatable(folder.path, "--run-dir")
    else:
        require_writable(folder.path, "--run-dir")
        lock_folder(folder.path, "--run-dir")
        require_writable(folder.checkpoints, "--run-dir")
        remove_leftovers(folder.checkpoints)
    start = find_start(folder, config, device)
    if not start.damaged:
        return start
    moved_aside = [path if dry_run else folder.move_aside(path) for path, _ in start.damaged]
    for (path, reason), new_path in zip(start.damaged, moved_aside, strict=True):
        log.warning("skipped %s%s: %s", path.name, "" if dry_run else f", moved aside to {new_path}", reason)
    log.warning("resuming from %s, the newest valid checkpoint", start.checkpoint)
    return start.model_copy(update={"moved_aside": tuple(moved_aside)})


def find_start(folder: RunFolder, config: TrainConfig, device: str) -> Start:
    """Find where a run of `config` in `folder` starts: verify the checkpoint and check that `config` may resume it.

    Raises:
        UserError: the folder holds a run that `config` may not resume, `--resume` names no valid checkpoint, or the
            folder holds checkpoints and none is valid.
    """
    launched = load_config(folder.config) if folder.config.exists() else None
    launched = _recognize_weights(folder, config, launched)
    candidates = _choose_candidates(folder, config, launched)
    newest = find_newest_valid(candidates.paths)
    if newest.checkpoint is None or newest.manifest is None:
        _require_none_skipped(candidates, newest.skipped)
        if launched is not None:  # it saved nothing: compare with what the folder was made for
            require_resumable(config, launched, candidates.place, device)
        return Start()
    saved = load_config(newest.checkpoint / CONFIG)
    progress = read_json(newest.checkpoint / PROGRESS)
    step, identity = progress.get("step", 0), progress.get("identity", {})
    if candidates.kind == "weights":
        require_same_architecture(saved.model, config.model, newest.checkpoint)
        if launched is not None:
            require_resumable(config, launched, candidates.place, device)
        val_loss = newest.manifest.metrics.get(VAL_LOSS)
        quality = "" if val_loss is None else f", {VAL_LOSS} {val_loss:.4f}"
        return Start(
            init_from=newest.checkpoint,
            weights_note=f"weights from {newest.checkpoint}, step {step}{quality}",
            identity=identity,
            manifest_sha256=newest.manifest.sha256,
        )
    # A fork may name other weights than the run it forks; a run with a checkpoint need not name its weights again.
    own_weights = launched.init_from if launched is not None and candidates.kind == "own" else config.init_from
    given = config.model_copy(update={"init_from": config.init_from or own_weights})
    before = saved.model_copy(update={"init_from": own_weights})
    differences = require_resumable(given, before, candidates.place, device)
    return Start(
        checkpoint=newest.checkpoint,
        is_fork=candidates.kind == "fork",
        step=step,
        is_evaluated=folder.has_evaluation(step),
        saved=saved,
        identity=identity,
        manifest_sha256=newest.manifest.sha256,
        differences=differences,
        mismatch=environment_mismatch(newest.checkpoint, newest.manifest),
        damaged=newest.skipped,
    )


def _recognize_weights(folder: RunFolder, config: TrainConfig, launched: TrainConfig | None) -> TrainConfig | None:
    """Return `launched` with the --init-from of this launch if both name one checkpoint, which has been moved."""
    if launched is None or launched.init_from is None or config.init_from is None:
        return launched
    if find_origin(folder, config.init_from) is None:
        return launched
    return launched.model_copy(update={"init_from": config.init_from})


def _choose_candidates(folder: RunFolder, config: TrainConfig, launched: TrainConfig | None) -> _Candidates:
    """Choose the checkpoints that `--resume`, `--init-from` and the folder allow a launch to start from.

    Args:
        folder: the run folder.
        config: configuration of this launch.
        launched: the folder's config.json; None if no run was launched there.

    Raises:
        UserError: the folder holds another run, or `--resume` goes back over its steps.
    """
    own, place = tuple(folder.list_step_folders()), f"--run-dir {folder.path}"
    if launched is None and (own or folder.metrics.exists()):
        raise UserError(f"{place} holds a run without its config.json; use another --run-dir")
    if launched is not None and config.resume == "never":
        raise UserError(f"{place} holds a run; --resume auto resumes it, or use another --run-dir")
    forked = config.resume if launched is None else launched.resume
    if launched is not None and config.resume not in NO_CHECKPOINT:
        named = Path(config.resume).resolve()
        own_places = {folder.path.resolve(), folder.checkpoints.resolve()}  # `checkpoints` may be a link elsewhere
        if not own_places.isdisjoint((named, *named.parents)):
            _require_newest(folder, config.resume)
            return _Candidates((own[-1],), "own", f"--resume {config.resume}")
        if not _is_origin(launched.resume, named):
            moved = find_origin(folder, named)
            if moved is None:
                raise UserError(f"{place} holds a run that did not start from {config.resume}; use another --run-dir")
            forked = str(moved)
    if own:
        return _Candidates(own, "own", place, is_named=False)
    if forked not in NO_CHECKPOINT:  # also a fork that was killed before its first checkpoint
        return _Candidates((locate_checkpoint(Path(forked), "--resume"),), "fork", f"--resume {forked}")
    if config.init_from is not None:
        return _Candidates((_locate_weights(config.init_from, config.data.cache_dir),), "weights", place)
    return _Candidates(place=place)


def _is_origin(origin: str, named: Path) -> bool:
    """Return whether `named` is the checkpoint that a run started from, or the run of that checkpoint.

    Args:
        origin: `resume` in the run's config.json.
        named: resolved path.
    """
    if origin in NO_CHECKPOINT:
        return False
    checkpoint = Path(origin)
    return named in (path.resolve() for path in (checkpoint, *checkpoint.parents[:2]))


def _require_newest(folder: RunFolder, named: str) -> None:
    """Check that `--resume` names a run's own folder or its newest checkpoint.

    Raises:
        UserError: there is no checkpoint, or it names an earlier one.
    """
    checkpoint = locate_checkpoint(Path(named), "--resume")
    newest = folder.list_step_folders()[-1]
    if Path(named).resolve() not in (folder.path.resolve(), newest.resolve()):
        raise UserError(
            f"--resume {checkpoint} is not the newest checkpoint of its run, which --resume auto takes; to train on "
            "from an earlier one, use another --run-dir"
        )


def _locate_weights(path: Path, cache_dir: Path) -> Path:
    """Return the checkpoint that `--init-from` names; a model in Hugging Face's format is imported into the cache.

    Raises:
        UserError: there is none, or the model cannot be imported.
    """
    try:
        imported = import_into_cache(str(path), cache_dir)
    except UserError as error:
        raise UserError(f"--init-from {error}") from error
    return imported or locate_checkpoint(path, "--init-from")


def _require_none_skipped(candidates: _Candidates, skipped: Sequence[tuple[Path, str]]) -> None:
    """Check that there was no checkpoint to start from, rather than none that is valid."""
    reasons = "; ".join(reason for _, reason in skipped)
    if candidates.is_named and skipped:
        raise UserError(reasons)  # a checkpoint that the user names is never replaced by another
    if skipped:
        raise UserError(
            f"{candidates.place} holds checkpoints and none is valid: {reasons}; restore one from a copy, or use "
            "another --run-dir to start from step 0"
        )


def require_same_manifest(start: Start, rank: int) -> None:
    """Check that this rank sees the checkpoint that rank 0 has found.

    Raises:
        UserError: it sees none, or another one.
    """
    if start.checkpoint is None or rank == 0:
        return
    try:
        is_same = sha256_of_file(start.checkpoint / CHECKPOINT_MANIFEST) == start.manifest_sha256
    except OSError:
        is_same = False
    if not is_same:
        raise UserError(
            f"it does not see {start.checkpoint} as rank 0 does; --run-dir must be one folder that all machines share"
        )
