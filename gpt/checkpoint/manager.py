"""Saving and pruning over the course of a run."""

import logging
from pathlib import Path

from safetensors import SafetensorError

from gpt.checkpoint.app_state import AppState
from gpt.checkpoint.run_folder import RunFolder, step_of
from gpt.checkpoint.store import read_checkpoint, verify, write_checkpoint
from gpt.errors import UserError
from gpt.utils.atomic_io import remove_folder
from gpt.utils.distributed import DistContext
from gpt.utils.helper import first_line

log = logging.getLogger(__name__)


class CheckpointManager:
    """Rank 0 writes, and a failure is every rank's.

    Args:
        folder: the run's folder.
        keep: newest checkpoints to keep; 0: all.
        config_json: goes into each checkpoint, so that one can be read without its run.
        dist: the processes that train.
    """

    def __init__(self, folder: RunFolder, keep: int, config_json: str, dist: DistContext):
        self._folder = folder
        self._keep = keep
        self._config_json = config_json
        self._dist = dist

    def save(self, state: AppState) -> Path:
        """Commit the state of its step; a step that is committed already is left as it is.

        Raises:
            UserError: the disk refused.
        """
        path = self._folder.checkpoint_at(state.progress.step)
        self._dist.on_main(lambda: self._save_and_prune(path, state))
        return path

    def finish(self) -> None:
        """Return when everything that was to be saved is committed."""

    def load_newest(self, state: AppState, at_most: int) -> Path | None:
        """Load the newest checkpoint that verifies, of those up to a step; later ones are removed.

        Returns:
            The checkpoint; None if there is none, and then nothing is changed.
        """
        found = self._dist.on_main(lambda: self._newest_sound(at_most))
        if found is None:
            return None
        path = Path(found)
        read_checkpoint(path, state)
        self._dist.on_main(lambda: self._remove_after(step_of(path)))
        return path

    def _newest_sound(self, at_most: int) -> str | None:
        for path in reversed(self._folder.committed()):
            if step_of(path) <= at_most:
                try:
                    verify(path)
                    return str(path)
                except UserError as error:
                    log.warning("%s", error)
        return None

    def _remove_after(self, step: int) -> None:
        for path in self._folder.committed():
            if step_of(path) > step:
                remove_folder(path)

    def _save_and_prune(self, path: Path, state: AppState) -> None:
        try:
            if not path.exists():
                write_checkpoint(path, state, self._config_json)
            for old in self._folder.committed()[: -self._keep] if self._keep else ():
                remove_folder(old)
        except (OSError, SafetensorError) as error:
            raise UserError(
                f"{path}: the checkpoint cannot be saved: {first_line(error)}; those already there are untouched"
            ) from error
