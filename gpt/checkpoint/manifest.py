"""manifest.json: the files of a checkpoint with their digests, the environment that wrote them, and its own digest."""

import errno
import hashlib
import math
import stat
import sys
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from gpt.checkpoint.tensor_file import FileRecord
from gpt.errors import UserError
from gpt.machine.arithmetic_check import SUSPECTS, digest_matmuls, read_variables
from gpt.machine.cuda_runtime import describe_gpu
from gpt.machine.resources import usable_cores
from gpt.ops import attention_cpu
from gpt.utils.atomic_io import parse_json_object
from gpt.utils.helper import sha256_of_file
from gpt.utils.sealed_json import SEAL_KEY, seal_json, verify_seal

CHECKPOINT_FORMAT_VERSION = 3
"""Version 1 recorded no environment and no digest of the manifest itself; version 2 took that digest in another way."""
CHECKPOINT_MANIFEST = "manifest.json"
MODEL, OPTIMIZER, PROGRESS, CONFIG = "model.safetensors", "optimizer.safetensors", "progress.json", "config.json"
FILES = (MODEL, OPTIMIZER, PROGRESS, CONFIG)
"""All files that a manifest may name."""
VAL_LOSS = "val/loss"
"""Metric that decides which checkpoint is the best."""

_MAX_MANIFEST_BYTES = 2**20
_DAMAGE_ERRORS = frozenset({errno.ENOENT, errno.ENOTDIR, errno.ELOOP, errno.EIO})
"""Errors of a file that is missing, is a link, or lies on a block that the disk has lost; any other may pass."""
_SHA256_DIGITS = 64
_LEGACY_SEAL_KEY = "manifest_sha256"
"""Key of the manifest's digest in version 2, which was taken with 64 zeros in its place."""
_BITS_DEPEND_ON = {
    "torch": "torch",
    "threads": "threads per process",
    "cpu_capability": "CPU capability",
    "fused_attention": "fused attention",
    "matmuls": "the bits of matmuls",
    "gpu": "GPU",
    "cuda": "CUDA",
}


class NewerFormatError(UserError):
    """A checkpoint of a format that only a newer version of this program reads."""


@dataclass(frozen=True)
class CheckpointManifest:
    """Contents of a checkpoint's manifest."""

    format_version: int
    files: dict[str, FileRecord]
    environment: dict[str, Any]
    """Facts that the bits of a run depend on, besides its configuration and its data."""
    metrics: dict[str, float]
    sha256: str
    """SHA-256 of the manifest file."""


def encode_manifest(
    files: Mapping[str, FileRecord], *, identity: Mapping[str, Any], metrics: Mapping[str, float], world_size: int
) -> bytes:
    """Return the manifest of a checkpoint that this process writes.

    Args:
        files: name -> size and digest.
        identity: values that a run must share with this one to resume it.
        metrics: metrics of the model at this step; those that are not finite are left out.
        world_size: number of ranks.
    """
    content = {
        "format_version": CHECKPOINT_FORMAT_VERSION,
        "files": {name: asdict(record) for name, record in files.items()},
        "environment": _current_environment() | {"world_size": world_size},
        "identity": dict(identity),
        "metrics": {name: value for name, value in metrics.items() if math.isfinite(value)},
    }
    return seal_json(content).encode()


def verify(checkpoint: Path) -> CheckpointManifest:
    """Compare every file of a checkpoint with its manifest, in parallel.

    Returns:
        The manifest.

    Raises:
        UserError: a file differs; the message names the first one.
        OSError: a file cannot be read now, and may be readable later.
    """
    manifest = read_checkpoint_manifest(checkpoint)
    expected = manifest.files
    for name in FILES:
        size = _size_of(checkpoint / name)
        if size != expected[name].size:
            raise _damage_error(checkpoint / name, f"{size} bytes instead of {expected[name].size}")
    by_size = sorted(FILES, key=lambda name: -expected[name].size)  # the longest file starts first
    with ThreadPoolExecutor(min(usable_cores(), len(FILES))) as pool:
        found = dict(zip(by_size, pool.map(lambda name: _sha256(checkpoint / name), by_size), strict=True))
    for name in FILES:
        if found[name] != expected[name].sha256:
            raise _damage_error(checkpoint / name, f"SHA-256 {found[name]} instead of {expected[name].sha256}")
    return manifest


def read_checkpoint_manifest(checkpoint: Path) -> CheckpointManifest:
    """Read and check a checkpoint's manifest without looking at the files that it names.

    Raises:
        NewerFormatError: a newer version of this program wrote it.
        UserError: it is damaged.
        OSError: it cannot be read now, and may be readable later.
    """
    file = checkpoint / CHECKPOINT_MANIFEST
    try:
        if checkpoint.is_symlink():
            raise UserError(f"{checkpoint}: a symbolic link, not a folder; use the folder that it points to")
        if _size_of(file) > _MAX_MANIFEST_BYTES:
            raise _damage_error(file, f"it is longer than {_MAX_MANIFEST_BYTES} bytes")
        data = file.read_bytes()
        content = parse_json_object(text := data.decode())
        _verify_format(content, text, checkpoint)
    except OSError as error:
        raise _read_error(file, error) from error
    except ValueError as error:
        raise _damage_error(file, str(error)) from error
    return CheckpointManifest(
        content["format_version"],
        _parse_files(content.get("files"), file),
        _as_dict(content.get("environment")),
        {
            str(name): float(value)
            for name, value in _as_dict(content.get("metrics")).items()
            if isinstance(value, (int, float)) and abs(value) <= sys.float_info.max
        },
        hashlib.sha256(data).hexdigest(),
    )


def environment_mismatch(checkpoint: Path, manifest: CheckpointManifest) -> str | None:
    """Return one line on why this process may not continue `checkpoint` bit-exactly; None if it does."""
    saved, current = manifest.environment, _current_environment()
    differences = [
        f"{name} {saved[key]!r:.60} (now {current.get(key)!r})"
        for key, name in _BITS_DEPEND_ON.items()
        if key in saved and saved[key] != current.get(key)
    ]
    if (
        saved.get("matmuls", current["matmuls"]) != current["matmuls"]
        and saved.get("variables") != current["variables"]
    ):
        differences.append(f"variables {saved.get('variables')!r:.200} (now {current['variables']!r:.200})")
    return f"not bit-exact: {checkpoint.name} was written with {', '.join(differences)}" if differences else None


def _verify_format(content: Mapping[str, Any], text: str, checkpoint: Path) -> None:
    """Check a manifest's version, and its own digest as that version takes it.

    Raises:
        ValueError: the digest is missing or differs.
        UserError: the version is unknown.
    """
    version = content.get("format_version", "unknown")
    if type(version) is not int or version < 1 or version > CHECKPOINT_FORMAT_VERSION:
        newer = type(version) is int and version > CHECKPOINT_FORMAT_VERSION
        raise (NewerFormatError if newer else UserError)(
            f"{checkpoint}: checkpoint format {version!r:.40}, but this version reads formats 1 to "
            f"{CHECKPOINT_FORMAT_VERSION}; {'use a newer gpt-training-pipeline' if newer else 'delete it'}"
        )
    if version == CHECKPOINT_FORMAT_VERSION:
        verify_seal(text, content)
    else:
        _verify_legacy_seal(content, text, version)


def _verify_legacy_seal(content: Mapping[str, Any], text: str, version: int) -> None:
    """Check the digest of a manifest of version 2; version 1 had none.

    Raises:
        ValueError: the digest is missing, differs, or is one that the version did not have.
    """
    expected = content.get(_LEGACY_SEAL_KEY)
    if SEAL_KEY in content or (version == 1 and expected is not None):
        raise ValueError(f"format_version {version} had no such digest")
    if version == 1:
        return
    if expected is None:
        raise ValueError(f"it lacks its own digest, {_LEGACY_SEAL_KEY}")
    blank = text.replace(str(expected), "0" * _SHA256_DIGITS).encode(errors="replace")
    found = hashlib.sha256(blank).hexdigest()
    if found != expected:
        raise ValueError(f"SHA-256 {found} instead of {expected!r:.80}")


def _current_environment() -> dict[str, Any]:
    return {
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "fused_attention": attention_cpu.is_enabled(),
        "matmuls": digest_matmuls(),
        "variables": ", ".join(f"{name}={value}" for name, value in read_variables(SUSPECTS).items()),
        **describe_gpu(),
    }


def _parse_files(entries: Any, manifest: Path) -> dict[str, FileRecord]:
    """Return size and digest of exactly the files in FILES: a manifest does not choose which files are opened."""
    names = set(_as_dict(entries))
    if names != set(FILES):
        wrong = min(names ^ set(FILES))
        raise _damage_error(manifest, f"it {'names' if wrong in names else 'does not name'} {wrong!r:.80}")
    records = {}
    for name in FILES:
        size, sha256 = (_as_dict(entries[name]).get(key) for key in ("size", "sha256"))
        if type(size) is not int or not (isinstance(sha256, str) and len(sha256) == _SHA256_DIGITS):
            raise _damage_error(manifest, f"it records no size and SHA-256 of {name}")
        records[name] = FileRecord(size, sha256)
    return records


def _as_dict(value: Any) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}


def _size_of(file: Path) -> int:
    """Return the bytes of a regular file; links, devices and pipes are refused before anything opens them."""
    try:
        found = file.lstat()
    except (FileNotFoundError, NotADirectoryError) as error:
        raise UserError(
            f"{file}: missing from the checkpoint ({error.strerror}); delete {file.parent} to resume from an earlier "
            "checkpoint"
        ) from error
    except OSError as error:
        raise _read_error(file, error) from error
    if not stat.S_ISREG(found.st_mode):
        raise UserError(f"{file}: not a regular file, as all files of a checkpoint must be; delete {file.parent}")
    return found.st_size


def _sha256(file: Path) -> str:
    try:
        return sha256_of_file(file, follow_links=False)  # the file that `_size_of` saw may have been replaced by a link
    except OSError as error:
        raise _read_error(file, error) from error


def _read_error(file: Path, error: OSError) -> UserError | OSError:
    """Return the error for a file that cannot be read: a UserError if it is damaged, an OSError if it may not be."""
    if error.errno in _DAMAGE_ERRORS:
        return UserError(f"{file}: cannot be read: {error.strerror}")
    return OSError(error.errno, error.strerror, str(file))


def _damage_error(file: Path, what: str) -> UserError:
    return UserError(f"{file}: damaged: {what}; delete {file.parent} to resume from an earlier checkpoint")
