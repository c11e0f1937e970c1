"""Saving and pruning over the course of a run."""

from pathlib import Path

from safetensors import SafetensorError

from gpt.checkpoint.app_state import AppState
from gpt.checkpoint.run_folder import RunFolder
from gpt.checkpoint.store import snapshot_of, write_checkpoint
from gpt.errors import UserError
from gpt.utils.atomic_io import remove_folder
from gpt.utils.distributed import DistContext
from gpt.utils.helper import first_line


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

    def _save_and_prune(self, path: Path, state: AppState) -> None:
        try:
            if not path.exists():
                write_checkpoint(path, snapshot_of(state, {}), self._config_json)
            for old in self._folder.committed()[: -self._keep] if self._keep else ():
                remove_folder(old)
        except (OSError, SafetensorError) as error:
            raise UserError(
                f"{path}: the checkpoint cannot be saved: {first_line(error)}; those already there are untouched"
            ) from error
