"""A checkpoint folder: safetensors for tensors, JSON for the rest, and a manifest with every file's SHA-256.

It is written under another name and renamed once all of it is on the disk, so `step_XXXXXXXX` is always complete. There
is no pickle on any path, and nothing outside the folder is opened.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gpt.checkpoint.app_state import AppState, Tensors
from gpt.checkpoint.manifest import CHECKPOINT_MANIFEST, CONFIG, MODEL, OPTIMIZER, PROGRESS, encode_manifest, verify
from gpt.checkpoint.tensor_file import read_tensors, write_bytes, write_tensors
from gpt.errors import UserError
from gpt.utils.atomic_io import commit_folder, make_folder, read_json
from gpt.utils.helper import first_line


@dataclass(frozen=True)
class Snapshot:
    """A state in host memory that does not change while training goes on."""

    model: Tensors
    optimizer: Tensors
    progress: dict[str, Any]
    metrics: Mapping[str, float]
    """Metrics of the model at this step."""
    world_size: int

    @property
    def nbytes(self) -> int:
        """Bytes of the tensors."""
        return sum(tensor.nbytes for tensors in (self.model, self.optimizer) for tensor in tensors.values())


def take_snapshot(state: AppState, metrics: Mapping[str, float], world_size: int = 1) -> Snapshot:
    """Return the state as it is; tensors that are in host memory already are not copied."""
    return Snapshot(
        _to_host(state.model_tensors()), _to_host(state.optimizer_tensors()), state.progress_json(), metrics, world_size
    )


def write_checkpoint(path: Path, snapshot: Snapshot, config_json: str) -> None:
    """Commit the snapshot as `path`, which must not exist.

    Raises:
        OSError: the disk refused; nothing is left of the attempt.
    """
    make_folder(path.parent)
    with commit_folder(path) as folder:
        files = {
            MODEL: write_tensors(folder / MODEL, snapshot.model),
            OPTIMIZER: write_tensors(folder / OPTIMIZER, snapshot.optimizer),
            PROGRESS: write_bytes(folder / PROGRESS, [json.dumps(snapshot.progress).encode()]),
            CONFIG: write_bytes(folder / CONFIG, [config_json.encode()]),
        }
        manifest = encode_manifest(
            files,
            identity=snapshot.progress["identity"],
            metrics=snapshot.metrics,
            world_size=snapshot.world_size,
        )
        write_bytes(folder / CHECKPOINT_MANIFEST, [manifest])


def load_checkpoint(path: Path, state: AppState) -> None:
    """Load a checkpoint into `state` without verifying it, which the caller has done.

    Raises:
        UserError: a file cannot be read or does not fit the model.
    """
    model, optimizer, progress = read_tensors(path / MODEL), read_tensors(path / OPTIMIZER), read_json(path / PROGRESS)
    try:
        state.load(model, optimizer, progress)
    except UserError as error:
        raise UserError(f"{path}: {error}") from error
    except (ArithmeticError, AttributeError, LookupError, RuntimeError, TypeError, ValueError) as error:
        reason = f"{type(error).__name__}: {first_line(error)}"
        raise UserError(f"{path}: not a checkpoint of this program: {reason}; delete it") from error


def verify_and_load(path: Path, state: AppState) -> None:
    """Verify a checkpoint, then load it into `state`.

    Raises:
        UserError: a file is missing, was changed, or does not fit the model.
    """
    verify(path)
    load_checkpoint(path, state)


def read_weights(path: Path) -> Tensors:
    """Verify a checkpoint, then return the tensors of its model alone."""
    verify(path)
    return read_tensors(path / MODEL)


def _to_host(tensors: Tensors) -> Tensors:
    return {name: tensor.detach().contiguous().cpu() for name, tensor in tensors.items()}
