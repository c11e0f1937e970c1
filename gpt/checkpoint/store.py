"""A checkpoint folder: safetensors for tensors, JSON for the rest, and a manifest with every file's SHA-256.

It is written under another name and renamed when all of it is on the disk, so `step_XXXXXXXX` is always whole; and it
is read only as far as its manifest holds. There is no pickle on any path, and nothing outside the folder is opened.
"""

import hashlib
import json
import math
import os
import stat
import sys
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from gpt.checkpoint.app_state import AppState, Tensors
from gpt.checkpoint.tensor_file import CHUNK, FileRecord, read_tensors, write_bytes, write_tensors
from gpt.errors import UserError
from gpt.machine.resources import usable_cores
from gpt.ops import attention_cpu
from gpt.utils.atomic_io import make_folder, new_folder
from gpt.utils.helper import first_line

CHECKPOINT_FORMAT_VERSION = 2
"""Version 1 said nothing of the environment and had no digest of the manifest itself."""
MODEL, OPTIMIZER, PROGRESS, CONFIG, CHECKPOINT_MANIFEST = (
    "model.safetensors",
    "optimizer.safetensors",
    "progress.json",
    "config.json",
    "manifest.json",
)
FILES = (MODEL, OPTIMIZER, PROGRESS, CONFIG)
"""All that a manifest may name."""
VAL_LOSS = "val/loss"
"""The metric that says which checkpoint is the best."""

_MAX_MANIFEST_BYTES = 2**20
_OWN_DIGEST = "manifest_sha256"
_BLANK = "0" * 64
"""Stands for the manifest's digest while it is taken."""
_BITS_DEPEND_ON = {
    "torch": "torch",
    "threads": "threads per process",
    "cpu_capability": "CPU capability",
    "fused_attention": "fused attention",
}


@dataclass(frozen=True)
class Snapshot:
    """A state at rest: what a checkpoint will hold, in host memory, whatever the run does meanwhile."""

    model: Tensors
    optimizer: Tensors
    progress: dict[str, Any]
    metrics: Mapping[str, float]
    """Of the model at this step; those that are not finite are left out."""
    world_size: int

    @property
    def nbytes(self) -> int:
        """Of the tensors."""
        return sum(tensor.nbytes for tensors in (self.model, self.optimizer) for tensor in tensors.values())


@dataclass(frozen=True)
class CheckpointManifest:
    """What a checkpoint says of itself."""

    format_version: int
    files: dict[str, FileRecord]
    environment: dict[str, Any]
    """What the bits of a run depend on, beside its configuration and its data."""
    metrics: dict[str, float]


def snapshot_of(state: AppState, metrics: Mapping[str, float], world_size: int = 1) -> Snapshot:
    """The state as it is: tensors that lie in host memory already are not copied."""
    return Snapshot(
        _on_host(state.model_tensors()), _on_host(state.optimizer_tensors()), state.progress_json(), metrics, world_size
    )


def write_checkpoint(path: Path, snapshot: Snapshot, config_json: str) -> None:
    """Commit the snapshot as `path`, which must not exist.

    Raises:
        OSError: the disk refused; nothing is left of the attempt.
    """
    make_folder(path.parent)
    with new_folder(path) as folder:
        files = {
            MODEL: write_tensors(folder / MODEL, snapshot.model),
            OPTIMIZER: write_tensors(folder / OPTIMIZER, snapshot.optimizer),
            PROGRESS: write_bytes(folder / PROGRESS, [json.dumps(snapshot.progress).encode()]),
            CONFIG: write_bytes(folder / CONFIG, [config_json.encode()]),
        }
        content = {
            "format_version": CHECKPOINT_FORMAT_VERSION,
            "files": {name: asdict(record) for name, record in files.items()},
            "environment": _environment() | {"world_size": snapshot.world_size},
            "identity": snapshot.progress["identity"],
            "metrics": {name: value for name, value in snapshot.metrics.items() if math.isfinite(value)},
            _OWN_DIGEST: _BLANK,
        }
        blank = json.dumps(content, indent=2)
        signed = json.dumps(content | {_OWN_DIGEST: hashlib.sha256(blank.encode()).hexdigest()}, indent=2)
        write_bytes(folder / CHECKPOINT_MANIFEST, [signed.encode()])


def read_checkpoint(path: Path, state: AppState) -> None:
    """Verify `path` and load it into `state`.

    Raises:
        UserError: a file is missing, was changed, or does not fit the model.
    """
    verify(path)
    model, optimizer, progress = read_tensors(path / MODEL), read_tensors(path / OPTIMIZER), read_json(path / PROGRESS)
    try:
        state.load(model, optimizer, progress)
    except (ArithmeticError, AttributeError, LookupError, RuntimeError, TypeError, ValueError) as error:
        told = f"{type(error).__name__}: {first_line(error)}"
        raise UserError(f"{path}: is no checkpoint of this program's: {told}; delete it") from error


def read_weights(path: Path) -> Tensors:
    """The model's tensors alone, verified."""
    verify(path)
    return read_tensors(path / MODEL)


def verify(path: Path) -> None:
    """Compare every file with the manifest, all of them at once.

    Raises:
        UserError: names the first file that differs.
    """
    expected = read_checkpoint_manifest(path).files
    for name in FILES:
        _require_size(path / name, expected[name].size)
    by_size = sorted(FILES, key=lambda name: -expected[name].size)  # the longest begins first
    with ThreadPoolExecutor(min(usable_cores(), len(FILES))) as pool:
        found = dict(zip(by_size, pool.map(lambda name: _sha256(path / name), by_size), strict=True))
    for name in FILES:
        if found[name] != expected[name].sha256:
            raise _damaged(path / name, f"SHA-256 {found[name]} instead of {expected[name].sha256}")


def read_checkpoint_manifest(path: Path) -> CheckpointManifest:
    """What the checkpoint `path` says of itself, the files not looked at.

    Raises:
        UserError: it is damaged, or says what no manifest says.
    """
    file = path / CHECKPOINT_MANIFEST
    if path.is_symlink():
        raise UserError(f"{path}: a symbolic link, not a folder; name the folder that it points to")
    if _size_of(file) > _MAX_MANIFEST_BYTES:
        raise _damaged(file, f"it is longer than {_MAX_MANIFEST_BYTES} bytes")
    content = read_json(file)
    version, own_digest = content.get("format_version", "unknown"), content.get(_OWN_DIGEST)
    if own_digest is not None:
        blank = file.read_bytes().replace(str(own_digest).encode(errors="replace"), _BLANK.encode())
        found = hashlib.sha256(blank).hexdigest()
        if found != own_digest:
            raise _damaged(file, f"SHA-256 {found} instead of {own_digest!r:.80}")
    if version not in range(1, CHECKPOINT_FORMAT_VERSION + 1) or isinstance(version, bool):
        raise UserError(
            f"{path}: checkpoint format {version!r:.40}; this version reads formats 1 to {CHECKPOINT_FORMAT_VERSION}, "
            "a newer one of gpt-training-pipeline may read it"
        )
    if version > 1 and own_digest is None:
        raise _damaged(file, f"it lacks its own digest, {_OWN_DIGEST}")
    return CheckpointManifest(
        version,
        _files_of(content.get("files"), file),
        _dict(content.get("environment")),
        {
            str(name): float(value)
            for name, value in _dict(content.get("metrics")).items()
            if isinstance(value, (int, float)) and abs(value) <= sys.float_info.max
        },
    )


def environment_mismatch(path: Path) -> str | None:
    """Where this process differs from the one that wrote `path` in what the bits of a run depend on, in one line."""
    there, here = read_checkpoint_manifest(path).environment, _environment()
    differences = [
        f"{name} {there[key]!r:.60} there and {here[key]!r} here"
        for key, name in _BITS_DEPEND_ON.items()
        if key in there and there[key] != here[key]
    ]
    return f"not bitwise: {path.name} was written with {', '.join(differences)}" if differences else None


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


def _environment() -> dict[str, Any]:
    return {
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "fused_attention": attention_cpu.in_use(),
    }


def _files_of(entries: Any, manifest: Path) -> dict[str, FileRecord]:
    """Exactly the known files, each with a size and a digest: a manifest decides nothing of what is opened."""
    names = set(_dict(entries))
    if names != set(FILES):
        wrong = min(names ^ set(FILES))
        raise _damaged(manifest, f"it {'names' if wrong in names else 'does not name'} {wrong!r:.80}")
    records = {}
    for name in FILES:
        size, sha256 = (_dict(entries[name]).get(key) for key in ("size", "sha256"))
        if type(size) is not int or not (isinstance(sha256, str) and len(sha256) == len(_BLANK)):
            raise _damaged(manifest, f"it gives {name} no size and SHA-256")
        records[name] = FileRecord(size, sha256)
    return records


def _dict(value: Any) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}


def _require_size(file: Path, expected: int) -> None:
    size = _size_of(file)
    if size != expected:
        raise _damaged(file, f"{size} bytes instead of {expected}")


def _size_of(file: Path) -> int:
    """Bytes of a file that is one: no link to what lies elsewhere, no device, no pipe that would be waited for."""
    try:
        found = file.lstat()
    except OSError as error:
        raise UserError(
            f"{file}: missing from the checkpoint ({error.strerror}); delete {file.parent} to go on from an earlier one"
        ) from error
    if not stat.S_ISREG(found.st_mode):
        raise UserError(f"{file}: not a regular file, which is all that a checkpoint may hold; delete {file.parent}")
    return found.st_size


def _sha256(file: Path) -> str:
    digest = hashlib.sha256()
    try:
        # Not following links: what `_size_of` saw may have been replaced.
        descriptor = os.open(file, os.O_RDONLY | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_BINARY", 0))
        with open(descriptor, "rb", buffering=0) as stream:  # noqa: PTH123
            buffer = memoryview(bytearray(min(CHUNK, os.fstat(descriptor).st_size)))
            while count := stream.readinto(buffer):
                digest.update(buffer[:count])
    except OSError as error:
        raise UserError(f"{file}: cannot be read: {error.strerror}") from error
    return digest.hexdigest()


def _damaged(file: Path, what: str) -> UserError:
    return UserError(f"{file}: damaged: {what}; delete {file.parent} to go on from an earlier checkpoint")


def _on_host(tensors: Tensors) -> Tensors:
    return {name: tensor.detach().contiguous().cpu() for name, tensor in tensors.items()}
