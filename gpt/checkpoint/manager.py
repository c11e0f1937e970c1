"""Saving, pruning and falling back over the course of a run."""

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
from gpt.checkpoint.retention import steps_to_keep
from gpt.checkpoint.run_folder import RunFolder, step_of
from gpt.checkpoint.staging import Staging
from gpt.checkpoint.store import Snapshot, take_snapshot, verify_and_load, write_checkpoint
from gpt.configs.checkpoint_config import CheckpointConfig
from gpt.errors import UserError
from gpt.utils.atomic_io import make_folder, remove_folder
from gpt.utils.distributed import DistContext, PendingFlag
from gpt.utils.helper import first_line, format_si

log = logging.getLogger(__name__)

NON_TENSOR_BYTES = 2**20
"""Bytes that a checkpoint's other files take at most, for all that is expected."""
POLL_SECONDS = 1.0
"""Seconds after which processes that wait for the writer tell each other that they still do."""
INTERRUPT_GRACE_SECONDS = 0.5
"""Seconds that a writer has left when a user ends the process."""
FREE_SPACE = "lower --checkpoint.keep or free space"
REMEDIES = {
    errno.ENOSPC: FREE_SPACE,
    errno.EDQUOT: FREE_SPACE,
    errno.EFBIG: "raise the limit on the size of files (ulimit -f)",
    errno.EROFS: "mount the disk writable, or name another --run-dir",
    errno.EIO: "the disk fails (the system's log says more); name another --run-dir",
}


class CheckpointManager:
    """Rank 0 writes, beside the training unless told otherwise, and a failure is every rank's.

    Every method but `close` and `improves` is called by all ranks at the same step.

    Args:
        folder: the run's folder.
        config: what to keep, and whether to write asynchronously.
        config_json: goes into each checkpoint, so that one can be read without its run.
        dist: the processes that train.
        resumed_at: the step that the run continues from; committed checkpoints past it are not this run's.
    """

    def __init__(
        self, folder: RunFolder, config: CheckpointConfig, config_json: str, dist: DistContext, resumed_at: int = 0
    ):
        self._folder, self._config, self._config_json, self._dist = folder, config, config_json, dist
        self._resumed_at = resumed_at
        self._written: set[int] = set()
        self._losses = {step: loss for step, loss in dist.on_main(self._saved_losses) if step <= resumed_at}
        self._staging = Staging()
        self._writer: _Writer | None = None
        self._in_flight: tuple[int, Path] | None = None
        self._flag: PendingFlag | None = None
        self._committed: list[tuple[int, Path]] = []

    def save(self, state: AppState, metrics: Mapping[str, float] = MappingProxyType({})) -> None:
        """Commit the state of its step, now or soon; a step that is committed already is left as it is.

        A save that is under way is waited for.

        Raises:
            UserError: the disk refused, this time or the last.
        """
        self._settle()
        step = state.progress.step
        path = self._folder.checkpoint_at(step)
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
        """Checkpoints committed since the last call: the same on every rank. Waits for nothing that is not done.

        Raises:
            UserError: the writer failed; on every rank, at the step after the one during which it did.
        """
        if self._in_flight is not None:
            if self._flag is not None and self._flag.read():
                self._settle()
            else:
                self._flag = self._dist.all_reduce_max_async(int(self._is_done()))
        committed, self._committed = self._committed, []
        return committed

    def finish(self) -> list[tuple[int, Path]]:
        """Wait for the writer, then as `poll`."""
        self._settle()
        return self.poll()

    def load_newest(self, state: AppState, at_most: int | None = None) -> Path | None:
        """Bring the state back to the newest checkpoint that verifies; later ones are of a past that is given up.

        Args:
            state: loaded on every rank.
            at_most: the latest step that will do; None: any.

        Returns:
            The checkpoint; None if there is none, and then nothing is changed.
        """
        self._settle()
        found = self._dist.on_main(lambda: self._newest_whole(at_most))
        if found is None:
            return None
        path = Path(found)
        verify_and_load(path, state)
        step = state.progress.step
        self._dist.on_main(lambda: self._give_up_after(step))
        self._resumed_at = step
        self._written = {own for own in self._written if own <= step}
        self._losses = {own: loss for own, loss in self._losses.items() if own <= step}
        return path

    def improves(self, loss: float) -> bool:
        """Whether a val/loss is below that of every checkpoint so far."""
        return loss < min(self._losses.values(), default=math.inf)

    def close(self, error: BaseException | None) -> None:
        """Let the writer end what it has begun, for this process may; one that the user interrupts leaves at once."""
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
        """Wait for the writer, if there is one, and learn what became of it.

        In small steps, so that no single exchange between the processes takes long.
        """
        if self._in_flight is None:
            return
        done = self._flag is not None and self._flag.read()
        while not done:
            done = self._dist.all_reduce_max_async(int(self._is_done(POLL_SECONDS))).read()
        saved, self._in_flight, self._flag = self._in_flight, None, None
        self._dist.on_main(self._outcome)
        self._committed.append(saved)

    def _outcome(self) -> None:
        assert self._writer is not None
        writer, self._writer = self._writer, None
        if isinstance(writer.failure, UserError):
            raise writer.failure
        if writer.failure is not None:
            told = f"{type(writer.failure).__name__}: {first_line(writer.failure)}"
            raise UserError(f"{self._folder.path}: a checkpoint cannot be written: {told}") from writer.failure

    def _commit(self, step: int, snapshot: Snapshot) -> None:
        path = self._folder.checkpoint_at(step)
        try:
            if not self._is_there(path):
                make_folder(path.parent)
                self._make_room(step, snapshot.nbytes + NON_TENSOR_BYTES)
                write_checkpoint(path, snapshot, self._config_json)
            self._written.add(step)
            for stale in self._prunable(step):
                remove_folder(stale)
        except OSError as error:
            remedy = REMEDIES.get(error.errno or 0, "name another --run-dir")
            raise UserError(
                f"{error.filename or path}: the checkpoint of step {step} cannot be saved: {error.strerror}; {remedy}; "
                "those already there are untouched"
            ) from error

    def _is_there(self, path: Path) -> bool:
        """Whether a step is committed already; a damaged one, which the run was not continued from, gives way."""
        if not path.exists():
            return False
        try:
            verify(path)
        except UserError as error:
            log.warning("%s; it is written anew", error)
            remove_folder(path)
            return False
        return True

    def _make_room(self, step: int, needed: int) -> None:
        """Remove what will be dispensable, if it must be now, but for the newest one.

        Raises:
            UserError: there is still too little space.
        """
        parent = self._folder.checkpoints
        newest = self._folder.checkpoint_at(max(self._sound_steps(step), default=-1))
        for stale in self._prunable(step):
            if shutil.disk_usage(parent).free < needed and stale != newest:
                remove_folder(stale)
        free = shutil.disk_usage(parent).free
        if free < needed:
            raise UserError(
                f"the checkpoint of step {step} needs {format_si(needed)}B, {format_si(free)}B free on {parent}; "
                f"{FREE_SPACE}"
            )

    def _prunable(self, step: int) -> list[Path]:
        """Checkpoints that are not to be kept once that of `step` is committed; later ones are not looked at."""
        sound = self._sound_steps(step)
        chosen = steps_to_keep([*sound, step], self._losses, keep=self._config.keep, keep_best=self._config.keep_best)
        return [path for at, path in self._steps() if at < step and at not in chosen and self._config.keep]

    def _sound_steps(self, before: int) -> list[int]:
        """Committed steps but for those that were there past the one that the run continued from: it avoided them."""
        known = self._written
        return [step for step, _ in self._steps() if step < before and (step <= self._resumed_at or step in known)]

    def _steps(self) -> list[tuple[int, Path]]:
        return [(step_of(path), path) for path in self._folder.committed()]

    def _saved_losses(self) -> list[tuple[int, float]]:
        losses = []
        for step, path in self._steps():
            try:
                losses.append((step, read_checkpoint_manifest(path).metrics[VAL_LOSS]))
            except (KeyError, UserError):  # not evaluated, or damaged
                continue
        return losses

    def _newest_whole(self, at_most: int | None) -> str | None:
        found = find_newest_valid([path for step, path in self._steps() if at_most is None or step <= at_most])
        for path, reason in found.skipped:
            log.warning("skipped %s: %s", path.name, reason)
        return None if found.checkpoint is None else str(found.checkpoint)

    def _give_up_after(self, step: int) -> None:
        for at, path in reversed(self._steps()):
            if at > step:
                remove_folder(path)


class _Writer(Thread):
    """One save; a daemon, for a process that must end does not wait for a disk."""

    def __init__(self, work: Callable[[], None]):
        super().__init__(name="checkpoint writer", daemon=True)
        self._work = work
        self.failure: Exception | None = None
        self.start()

    def run(self) -> None:
        """Work, and keep what went wrong."""
        try:
            self._work()
        except Exception as error:
            self.failure = error
