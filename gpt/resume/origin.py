"""Recognize the checkpoint that a run started from by its content, wherever it is now."""

from pathlib import Path

from gpt.checkpoint.manifest import CHECKPOINT_MANIFEST
from gpt.checkpoint.run_folder import RunFolder
from gpt.utils.atomic_io import read_jsonl
from gpt.utils.helper import sha256_of_file


def find_origin(folder: RunFolder, named: Path) -> Path | None:
    """Return the checkpoint that a run started from, if it is at `named` or in the run there; else None.

    lineage.jsonl records the digest of its manifest, and so of all its files.

    Args:
        folder: folder of the run, which forked another or took its weights.
        named: folder of a run or of a checkpoint.
    """
    expected = next((record.get("manifest_sha256") for record in read_jsonl(folder.lineage)), None)
    if expected is None:
        return None
    candidates = (named, *RunFolder(named).list_checkpoints())
    return next((path for path in candidates if _digest_manifest(path) == expected), None)


def _digest_manifest(checkpoint: Path) -> str | None:
    try:
        return sha256_of_file(checkpoint / CHECKPOINT_MANIFEST)
    except OSError:
        return None
