"""Save, prune and roll back to the checkpoints of one run."""

import contextlib
import errno
import logging
import math
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from threading import Thread
from types import MappingProxyType

from gpt.checkpoint.app_state import AppState
from gpt.checkpoint.manifest import VAL_LOSS, read_checkpoint_manifest, verify
from gpt.checkpoint.newest import find_newest_valid
from gpt.checkpoint.replicate import load_on_all_ranks
from gpt.checkpoint.retention import steps_to_keep
from gpt.checkpoint.rollback import RollbackTargets
from gpt.checkpoint.run_folder import RunFolder, parse_step
from gpt.checkpoint.staging import Staging
from gpt.checkpoint.store import Snapshot, load_checkpoint, take_snapshot, write_checkpoint
from gpt.configs.checkpoint_config import CheckpointConfig
from gpt.errors import UserError
from gpt.utils.atomic_io import fsync, make_folder, remove_folder
from gpt.utils.distributed import DistContext
from gpt.utils.helper import first_line, format_si
from gpt.utils.pending_flag import PendingFlag

log = logging.getLogger(__name__)

NON_TENSOR_BYTES = 2**20
"""Upper estimate of the bytes of a checkpoint's other files."""
POLL_SECONDS = 1.0
"""Seconds between two all-reduces of ranks that wait for the writer."""
INTERRUPT_GRACE_SECONDS = 0.5
"""Seconds that the writer has left when a user interrupts the process."""
FREE_SPACE = "lower --checkpoint.keep or free space"
REMEDIES = {
    errno.ENOSPC: FREE_SPACE,
    errno.EDQUOT: FREE_SPACE,
    errno.EFBIG: "raise the limit on the size of files (ulimit -f)",
    errno.EROFS: "mount the disk writable, or use another --run-dir",
    errno.EIO: "the disk fails (the system's log says more); use another --run-dir",
}
"""Error of the system -> remedy."""


class CheckpointManager:
    """Checkpoints of one run. Rank 0 writes them, in the background by default; a failure is raised on every rank.

    All ranks call every method at the same step, except `improves` and `close`.

    Args:
        folder: the run's folder.
        config: how many checkpoints to keep, and whether to write asynchronously.
        config_json: the run's configuration, which is stored in each checkpoint so that it can be read without its run.
        dist: the ranks.
        resumed_at: the step that the run resumed at. Later checkpoints that were there already are not this run's.
        targets: the steps to roll back to, the newest of which is kept; None: any, and none is kept for that.
    """

    def __init__(
        self,
        folder: RunFolder,
        config: CheckpointConfig,
        config_json: str,
        dist: DistContext,
        resumed_at: int = 0,
        targets: RollbackTargets | None = None,
    ):
        self._folder, self._config, self._config_json, self._dist = folder, config, config_json, dist
        self._resumed_at, self._targets = resumed_at, targets
        self._written: set[int] = set()
        losses = dist.on_main(self._read_losses) if config.keep_best else []  # what only keep_best compares
        self._losses = {step: loss for step, loss in losses if step <= resumed_at}
        self._staging = Staging()
        self._writer: _Writer | None = None
        self._in_flight: tuple[int, Path] | None = None
        self._flag: PendingFlag | None = None
        self._committed: list[tuple[int, Path]] = []

    def save(self, state: AppState, metrics: Mapping[str, float] = MappingProxyType({})) -> None:
        """Commit the state as the checkpoint of its step, unless that step is committed already.

        Waits for the previous save. Returns before an asynchronous save is committed.

        Raises:
            UserError: the disk refused this save or the previous one.
        """
        self._settle()
        step = state.progress.step
        path = self._folder.checkpoint_path(step)
        if math.isfinite(loss := metrics.get(VAL_LOSS, math.nan)):
            self._losses[step] = loss
        if self._config.asynchronous:
            if self._dist.is_main:
                snapshot = self._staging.copy(state, metrics, self._dist.world_size)
                self._writer = _Writer(lambda: self._commit(step, snapshot))
            self._in_flight = step, path
        else:
            self._dist.on_main(lambda: self._commit(step, take_snapshot(state, metrics, self._dist.world_size)))
            self._committed.append((step, path))

    def poll(self) -> list[tuple[int, Path]]:
        """Return step and path of the checkpoints committed since the last call, without waiting; equal on every rank.

        Raises:
            UserError: the writer failed; raised on every rank, one step after the step during which it failed.
        """
        if self._in_flight is not None:
            if self._flag is not None and self._flag.read():
                self._settle()
            else:
                self._flag = self._dist.all_reduce_max_async(int(self._is_done()))
        committed, self._committed = self._committed, []
        return committed

    def finish(self) -> list[tuple[int, Path]]:
        """Wait for the writer, then return what `poll` returns."""
        self._settle()
        return self.poll()

    def load_newest(self, state: AppState, at_most: int | None = None) -> Path | None:
        """Load the newest valid checkpoint into the state, and remove all later ones.

        Rollback targets come first, however old; other checkpoints serve only if no target is valid.

        Args:
            state: the state of this rank.
            at_most: the latest step to accept; None: any.

        Returns:
            The checkpoint; None if none is valid, and then nothing is changed.
        """
        self._settle()
        found = self._dist.on_main(lambda: self._find_newest_valid(at_most))
        if found is None:
            return None
        path = Path(found)
        load_on_all_ranks(lambda: load_checkpoint(path, state), state, self._dist)  # rank 0 has just verified it
        step = state.progress.step
        self._dist.on_main(lambda: self._remove_later_than(step))
        self._resumed_at = step
        self._written = {written for written in self._written if written <= step}
        self._losses = {evaluated: loss for evaluated, loss in self._losses.items() if evaluated <= step}
        return path

    def improves(self, loss: float) -> bool:
        """Return whether a val/loss is below those of all checkpoints so far."""
        return loss < min(self._losses.values(), default=math.inf)

    def close(self, error: BaseException | None) -> None:
        """Let the writer finish; after an interrupt of the user it has INTERRUPT_GRACE_SECONDS.

        Args:
            error: what ends the run; None if nothing went wrong.
        """
        if self._writer is not None:
            interrupted = error is not None and not isinstance(error, Exception)
            self._writer.join(INTERRUPT_GRACE_SECONDS if interrupted else None)
            if self._writer.failure is not None:
                log.error("%s", self._writer.failure)

    def _is_done(self, wait: float = 0.0) -> bool:
        if self._writer is None:
            return False
        self._writer.join(wait)
        return not self._writer.is_alive()

    def _settle(self) -> None:
        """Wait for the writer, if there is one, and raise its failure on every rank.

        Ranks wait in short all-reduces, so that none of these exceeds --parallel.step-timeout.
        """
        if self._in_flight is None:
            return
        done = self._flag is not None and self._flag.read()
        while not done:
            done = self._dist.all_reduce_max_async(int(self._is_done(POLL_SECONDS))).read()
        saved, self._in_flight, self._flag = self._in_flight, None, None
        self._dist.on_main(self._raise_failure)
        self._committed.append(saved)

    def _raise_failure(self) -> None:
        assert self._writer is not None
        writer, self._writer = self._writer, None
        if isinstance(writer.failure, UserError):
            raise writer.failure
        if writer.failure is not None:
            reason = f"{type(writer.failure).__name__}: {first_line(writer.failure)}"
            raise UserError(
                f"{self._folder.path}: cannot write a checkpoint: {reason}; earlier checkpoints are unchanged"
            ) from writer.failure

    def _commit(self, step: int, snapshot: Snapshot) -> None:
        path = self._folder.checkpoint_path(step)
        try:
            if not self._is_committed(path):
                make_folder(path.parent)
                self._sync_records()
                self._make_room(step, snapshot.nbytes + NON_TENSOR_BYTES)
                write_checkpoint(path, snapshot, self._config_json)
            self._written.add(step)
            for stale in self._prunable(step):
                remove_folder(stale)
        except OSError as error:
            remedy = REMEDIES.get(error.errno or 0, "use another --run-dir")
            raise UserError(
                f"{error.filename or path}: the checkpoint of step {step} cannot be saved: {error.strerror}; {remedy}; "
                "earlier checkpoints are unchanged"
            ) from error

    def _sync_records(self) -> None:
        """Force the records of the steps up to this save to the disk: a resumed run begins after them.

        A disk that refuses is no reason to lose the checkpoint as well.
        """
        for records in (self._folder.metrics, self._folder.samples):
            with contextlib.suppress(OSError):
                fsync(records)

    def _is_committed(self, path: Path) -> bool:
        """Return whether a step is committed already; a damaged one, which the run did not resume from, is removed."""
        if not path.exists():
            return False
        try:
            verify(path)
        except UserError as error:
            log.warning("%s; it is written again", error)
            remove_folder(path)
            return False
        return True

    def _make_room(self, step: int, needed: int) -> None:
        """Prune before the save as far as it needs the space; the newest checkpoint and rollback target stay.

        Args:
            step: the step of the save.
            needed: bytes.

        Raises:
            UserError: there is still too little space.
        """
        parent = self._folder.checkpoints
        own = self._own_steps(step)
        needed_steps = {max(own, default=None), self._targets.find_newest(own) if self._targets else None}
        for stale in self._prunable(step):
            if shutil.disk_usage(parent).free < needed and parse_step(stale) not in needed_steps:
                remove_folder(stale)
        free = shutil.disk_usage(parent).free
        if free < needed:
            raise UserError(
                f"the checkpoint of step {step} needs {format_si(needed, 'B')}, but only {format_si(free, 'B')} are "
                f"free on {parent}; {FREE_SPACE}"
            )

    def _prunable(self, step: int) -> list[Path]:
        """Return the earlier checkpoints to remove once that of `step` is committed."""
        steps = [*self._own_steps(step), step]
        keep, keep_best = self._config.keep, self._config.keep_best
        kept_steps = steps_to_keep(steps, self._losses, keep=keep, keep_best=keep_best, targets=self._targets)
        return [path for at, path in self._steps() if at < step and at not in kept_steps and self._config.keep]

    def _own_steps(self, before: int) -> list[int]:
        """Return the committed steps of this run: those up to the one that it resumed at, and those that it wrote.

        Checkpoints past the resumed step that were there before are damaged: the run did not resume from them.
        """
        return [
            step for step, _ in self._steps() if step < before and (step <= self._resumed_at or step in self._written)
        ]

    def _steps(self) -> list[tuple[int, Path]]:
        return [(parse_step(path), path) for path in self._folder.list_checkpoints()]

    def _read_losses(self) -> list[tuple[int, float]]:
        losses = []
        for step, path in self._steps():
            try:
                losses.append((step, read_checkpoint_manifest(path).metrics[VAL_LOSS]))
            except (KeyError, UserError):  # not evaluated, or damaged
                continue
        return losses

    def _find_newest_valid(self, at_most: int | None) -> str | None:
        found_steps = [(step, path) for step, path in self._steps() if at_most is None or step <= at_most]
        if self._targets is not None:
            targets = self._targets
            found_steps.sort(key=lambda item: (item[0] in targets, item[0]))
        found = find_newest_valid([path for _, path in found_steps])
        for path, reason in found.skipped:
            log.warning("skipped %s: %s", path.name, reason)
        return None if found.checkpoint is None else str(found.checkpoint)

    def _remove_later_than(self, step: int) -> None:
        for at, path in reversed(self._steps()):
            if at > step:
                remove_folder(path)


class _Writer(Thread):
    """Thread of one save; a daemon, because a process that must end does not wait for a disk."""

    def __init__(self, work: Callable[[], None]):
        super().__init__(name="checkpoint writer", daemon=True)
        self._work = work
        self.failure: Exception | None = None
        self.start()

    def run(self) -> None:
        """Save, and store the failure if there is one."""
        try:
            self._work()
        except Exception as error:
            self.failure = error
