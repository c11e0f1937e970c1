"""Exact deduplication: of equal documents, the first in the order of the sources is kept.

Workers write a digest of every document, part by part. Then all digests are compared at once, and a mask for each part
says which of its documents to keep. Digests and masks lie beside the records of the parts, so neither is computed again
after an interruption.
"""

import hashlib
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from gpt.data.prepare.documents import Document
from gpt.data.prepare.parts import Part

DIGEST_BYTES = 16
"""Bytes of a document's SHA-256 that are compared: enough that different documents of a corpus never share them."""


def has_whole_documents(part: Part) -> bool:
    """Return whether a part is deduplicated: pieces of one large text are not."""
    return not (part.kind == "text" and part.stop is not None)


def write_digests(documents: Iterable[Document], path: Path) -> None:
    """Write the digest of every document of a part."""
    digests = b"".join(hashlib.sha256(document.content).digest()[:DIGEST_BYTES] for document in documents)
    _write_array(path, np.frombuffer(digests, dtype=np.uint8))


def write_keep_masks(digest_paths: Sequence[Path], mask_paths: Sequence[Path]) -> None:
    """Write, for each part, the mask of the documents that equal none before them; parts are in order."""
    digests = [np.fromfile(path, np.uint64).reshape(-1, 2) for path in digest_paths]
    keep = find_first_occurrences(np.concatenate([np.zeros((0, 2), np.uint64), *digests]))
    start = 0
    for path, part in zip(mask_paths, digests, strict=True):
        _write_array(path, keep[start : start + len(part)])
        start += len(part)


def find_first_occurrences(digests: npt.NDArray[np.uint64]) -> npt.NDArray[np.bool_]:
    """Return a mask of the rows that equal no row before them.

    >>> find_first_occurrences(np.array([[1, 2], [3, 4], [1, 2], [3, 5]], np.uint64)).tolist()
    [True, True, False, True]

    Args:
        digests: (n, 2), the two words of each digest.
    """
    order = np.lexsort((digests[:, 0], digests[:, 1]))  # stable: equal rows stay in order
    repeats = (digests[order[1:]] == digests[order[:-1]]).all(axis=1)
    is_first = np.ones(len(digests), dtype=np.bool_)
    is_first[order[1:][repeats]] = False
    return is_first


def drop_duplicates(documents: Iterable[Document], mask_path: Path) -> Iterator[Document]:
    """Yield the documents of a part that its mask keeps."""
    return (document for document, keep in zip(documents, _read_mask(mask_path), strict=True) if keep)


def count_duplicates(mask_path: Path) -> int:
    """Count the documents of a part that its mask drops."""
    return int((~_read_mask(mask_path)).sum())


def _read_mask(path: Path) -> npt.NDArray[np.bool_]:
    return np.fromfile(path, dtype=np.bool_)


def _write_array(path: Path, array: npt.NDArray[Any]) -> None:
    """Write the array's bytes in one step: a file that exists is complete."""
    temporary = path.with_suffix(".tmp")
    temporary.write_bytes(array.tobytes())
    temporary.replace(path)
