"""Find where a run starts: at step 0, from its own newest valid checkpoint, or from another run's checkpoint.

`claim_start` does all of it once and gives every rank the same `Start`. Nothing later loads the checkpoint's
configuration or manifest again, or hashes its files again.
"""

import logging
from pathlib import Path

from pydantic import Field

from gpt.checkpoint.manifest import (
    CHECKPOINT_MANIFEST,
    CONFIG,
    PROGRESS,
    CheckpointManifest,
    environment_mismatch,
    verify,
)
from gpt.checkpoint.newest import NewestValid, find_newest_valid
from gpt.checkpoint.run_folder import RunFolder, locate_checkpoint
from gpt.configs.base import Config
from gpt.configs.load import load_config
from gpt.configs.train_config import TrainConfig
from gpt.errors import UserError
from gpt.resume.compatibility import (
    PER_LAUNCH,
    Difference,
    find_differences,
    require_allowed,
    require_same_architecture,
)
from gpt.utils.atomic_io import read_json, remove_leftovers, require_creatable, require_writable
from gpt.utils.distributed import DistContext
from gpt.utils.folder_lock import lock_folder
from gpt.utils.helper import sha256_of_file

log = logging.getLogger(__name__)


class Start(Config):
    """The state that a run starts from; the default is step 0 with initial weights."""

    checkpoint: Path | None = None
    """Verified checkpoint to resume from."""
    init_from: Path | None = None
    """Checkpoint whose weights a run at step 0 starts with; it is verified when they are loaded."""
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


def claim_start(folder: RunFolder, config: TrainConfig, dist: DistContext, *, dry_run: bool) -> Start:
    """Lock the run's folder and find where the run starts; rank 0 decides, and every rank must see the same files.

    A dry run looks at the folder and writes nothing.

    Raises:
        UserError: the folder is in use, or holds a run that `config` may not resume.
    """
    start = Start.model_validate(dist.on_main(lambda: _claim(folder, config, dry_run).model_dump(mode="json")))
    dist.on_every_rank(lambda: _require_same_manifest(start, dist.rank))
    return start


def find_start(folder: RunFolder, config: TrainConfig) -> Start:
    """Find where a run of `config` in `folder` starts: verify the checkpoint and check that `config` may resume it.

    Raises:
        UserError: the folder holds a run that `config` may not resume, `--resume` names no valid checkpoint, or the
            folder holds checkpoints and none is valid.
    """
    if not folder.config.exists():
        if folder.list_step_folders() or folder.metrics.exists():
            raise UserError(f"--run-dir {folder.path} holds a run without its config.json; use another --run-dir")
        return _start_of_new_run(config, config.resume)
    if config.resume == "never":
        raise UserError(f"--run-dir {folder.path} holds a run; --resume auto resumes it, or use another --run-dir")
    launched = load_config(folder.config)
    place = f"--run-dir {folder.path}"
    if _names_checkpoint(config.resume) and not _is_own(config.resume, folder):
        if not _is_same_start(config.resume, launched.resume):
            raise UserError(f"{place} holds a run that did not start from {config.resume}; use another --run-dir")
    elif _names_checkpoint(config.resume):
        checkpoint = _require_newest(folder, config.resume)
        return _start_of_own_checkpoint(folder, config, launched, NewestValid(checkpoint, verify(checkpoint)))
    if folder.list_step_folders():
        return _start_of_own_checkpoint(folder, config, launched, find_newest_valid(folder.list_step_folders()))
    if not _names_checkpoint(launched.resume):  # it saved nothing: compare with what the folder was made for
        _require_allowed(config, launched, place)
    return _start_of_new_run(config, launched.resume)


def _claim(folder: RunFolder, config: TrainConfig, dry_run: bool) -> Start:
    """Lock the folder, clear partial files of a killed run, find the start, and move damaged checkpoints aside."""
    if dry_run:
        require_creatable(folder.path, "--run-dir")
    else:
        require_writable(folder.path, "--run-dir")
        lock_folder(folder.path, "--run-dir")
        require_writable(folder.checkpoints, "--run-dir")
        remove_leftovers(folder.checkpoints)
    start = find_start(folder, config)
    if not start.damaged:
        return start
    moved_aside = [path if dry_run else folder.move_aside(path) for path, _ in start.damaged]
    for (path, reason), new_path in zip(start.damaged, moved_aside, strict=True):
        log.warning("skipped %s%s: %s", path.name, "" if dry_run else f", moved aside to {new_path}", reason)
    log.warning("resuming from %s, the newest valid checkpoint", start.checkpoint)
    return start.model_copy(update={"moved_aside": tuple(moved_aside)})


def _start_of_new_run(config: TrainConfig, resume: str) -> Start:
    """Start at step 0, with the weights of `--init-from` if it is given, or fork the run that `resume` names."""
    if _names_checkpoint(resume):
        checkpoint = locate_checkpoint(Path(resume), "--resume")
        manifest = verify(checkpoint)
        # Weights that the forked run started with are no difference.
        start = _read_start(checkpoint, manifest, config, config.init_from, f"--resume {checkpoint}")
        return start.model_copy(update={"is_fork": True})
    if config.init_from is None:
        return Start()
    checkpoint = locate_checkpoint(config.init_from, "--init-from")
    require_same_architecture(load_config(checkpoint / CONFIG).model, config.model, checkpoint)
    return Start(init_from=checkpoint, identity=read_json(checkpoint / PROGRESS).get("identity", {}))


def _start_of_own_checkpoint(
    folder: RunFolder, config: TrainConfig, launched: TrainConfig, newest: NewestValid
) -> Start:
    """Resume from a checkpoint of the run's own.

    Args:
        folder: of the run.
        config: of this launch.
        launched: the folder's config.json, of an earlier launch.
        newest: the checkpoint and what was skipped on the way to it.

    Raises:
        UserError: no checkpoint is valid, or `config` may not resume it.
    """
    if newest.checkpoint is None or newest.manifest is None:
        reasons = "; ".join(reason for _, reason in newest.skipped)
        raise UserError(
            f"--run-dir {folder.path} holds checkpoints and none is valid: {reasons}; restore one from a copy, or use "
            "another --run-dir to start from step 0"
        )
    # Once the run has a checkpoint of its own, --init-from need not be repeated.
    given = config if config.init_from else config.model_copy(update={"init_from": launched.init_from})
    start = _read_start(newest.checkpoint, newest.manifest, given, launched.init_from, f"--run-dir {folder.path}")
    return start.model_copy(update={"is_evaluated": folder.has_evaluation(start.step), "damaged": newest.skipped})


def _read_start(
    checkpoint: Path, manifest: CheckpointManifest, config: TrainConfig, init_from: Path | None, place: str
) -> Start:
    """Return the start from a verified checkpoint that `config` may resume.

    Args:
        checkpoint: to resume from.
        manifest: of the checkpoint.
        config: of this launch.
        init_from: weights that the run is known to have started with.
        place: flag and path of the run, for the message.
    """
    saved = load_config(checkpoint / CONFIG)
    differences = _require_allowed(config, saved.model_copy(update={"init_from": init_from}), place)
    progress = read_json(checkpoint / PROGRESS)
    return Start(
        checkpoint=checkpoint,
        step=progress.get("step", 0),
        saved=saved,
        identity=progress.get("identity", {}),
        manifest_sha256=manifest.sha256,
        differences=tuple(item for item in differences if item.name not in PER_LAUNCH),
        mismatch=environment_mismatch(checkpoint, manifest),
    )


def _require_allowed(config: TrainConfig, saved: TrainConfig, place: str) -> tuple[Difference, ...]:
    differences = find_differences(saved, config)
    require_allowed(differences, place, with_changes=config.resume_with_changes)
    return differences


def _require_newest(folder: RunFolder, resume: str) -> Path:
    """Return the run's newest checkpoint if `resume` names it or the folder: a run never goes back over its steps."""
    checkpoint, newest = locate_checkpoint(Path(resume), "--resume"), folder.list_step_folders()[-1]
    if Path(resume).resolve() not in (folder.path.resolve(), newest.resolve()):
        raise UserError(
            f"--resume {checkpoint} is not the newest checkpoint of its run, which --resume auto takes; to train on "
            "from an earlier one, use another --run-dir"
        )
    return newest


def _require_same_manifest(start: Start, rank: int) -> None:
    if start.checkpoint is None or rank == 0:
        return
    try:
        is_same = sha256_of_file(start.checkpoint / CHECKPOINT_MANIFEST) == start.manifest_sha256
    except OSError:
        is_same = False
    if not is_same:
        raise UserError(
            f"rank {rank} does not see {start.checkpoint} as rank 0 does; --run-dir must be one folder that all "
            "machines share"
        )


def _names_checkpoint(resume: str) -> bool:
    return resume not in ("auto", "never")


def _is_own(resume: str, folder: RunFolder) -> bool:
    """Return whether `resume` names the run in `folder`: its folder, or something inside."""
    own, named = folder.path.resolve(), Path(resume).resolve()
    return own in (named, *named.parents)


def _is_same_start(given: str, saved: str) -> bool:
    """Return whether `given` names the checkpoint `saved`: itself, or a folder that it lies in."""
    return Path(given).resolve() in (Path(saved), *Path(saved).parents)
