"""A checkpoint folder: safetensors for tensors, JSON for the rest, and a manifest with every file's SHA-256.

It is written under another name and renamed when all of it is on the disk, so `step_XXXXXXXX` is always whole; and it
is read only as far as its manifest holds. There is no pickle on any path.
"""

import json
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file

from gpt.checkpoint.app_state import AppState, Tensors
from gpt.errors import UserError
from gpt.utils.atomic_io import new_folder
from gpt.utils.helper import sha256_of_file

FORMAT_VERSION = 1
MODEL, OPTIMIZER, PROGRESS, CONFIG, MANIFEST = (
    "model.safetensors",
    "optimizer.safetensors",
    "progress.json",
    "config.json",
    "manifest.json",
)


def write_checkpoint(path: Path, state: AppState, config_json: str) -> None:
    """Commit the state as `path`, which must not exist.

    Raises:
        OSError, SafetensorError: the disk refused; nothing is left of the attempt.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with new_folder(path) as folder:
        save_file(_on_host(state.model_tensors()), folder / MODEL)
        save_file(_on_host(state.optimizer_tensors()), folder / OPTIMIZER)
        (folder / PROGRESS).write_text(json.dumps(state.progress_json()), encoding="utf-8")
        (folder / CONFIG).write_text(config_json, encoding="utf-8")
        files = {file.name: {"size": file.stat().st_size, "sha256": sha256_of_file(file)} for file in folder.iterdir()}
        manifest = {"format_version": FORMAT_VERSION, "files": files}
        (folder / MANIFEST).write_text(json.dumps(manifest, indent=2), encoding="utf-8")


def read_checkpoint(path: Path, state: AppState) -> None:
    """Verify `path` and load it into `state`.

    Raises:
        UserError: a file is missing, was changed, or does not fit the model.
    """
    verify(path)
    state.load(load_file(path / MODEL), load_file(path / OPTIMIZER), read_json(path / PROGRESS))


def read_weights(path: Path) -> Tensors:
    """The model's tensors alone, verified."""
    verify(path)
    return load_file(path / MODEL)


def verify(path: Path) -> None:
    """Compare every file with the manifest.

    Raises:
        UserError: names the first file that differs.
    """
    manifest = read_json(path / MANIFEST)
    if manifest.get("format_version") != FORMAT_VERSION:
        version = manifest.get("format_version", "unknown")
        raise UserError(f"{path}: checkpoint format {version}; this version reads format {FORMAT_VERSION}")
    for name in (MODEL, OPTIMIZER, PROGRESS, CONFIG):
        expected = files.get(name) if isinstance(files := manifest.get("files"), dict) else None
        file = path / name
        if not file.is_file():
            raise UserError(f"{file}: missing from the checkpoint; delete {path} to go on from an earlier one")
        found = {"size": file.stat().st_size, "sha256": sha256_of_file(file)}
        if found != expected:
            wanted = expected.get("sha256") if isinstance(expected, dict) else None
            raise UserError(
                f"{file}: damaged: SHA-256 {found['sha256']} instead of {wanted}; delete {path} to go on from an "
                "earlier checkpoint"
            )


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object of a checkpoint or run.

    Raises:
        UserError: it is missing or is no JSON object.
    """
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: not valid JSON: {error}") from error
    if not isinstance(value, dict):
        raise UserError(f"{path}: not a JSON object")
    return value


def _on_host(tensors: Tensors) -> Tensors:
    return {name: tensor.detach().contiguous().cpu() for name, tensor in tensors.items()}
