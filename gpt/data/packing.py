"""Best-fit packing: whole documents in sequences of one length, with little padding.

Documents longer than a sequence are cut into full sequences and a rest. The rests are packed by best fit, longest
first: each goes into the sequence in which the least room remains. Of the simple rules this wastes the least (Ding et
al. 2024, "Fewer Truncations Improve Language Modeling"). Documents are packed in groups, so memory is bounded and a
document is packed with its neighbours.
"""

import errno
import hashlib
import logging
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from gpt.data.shards import TokenStream
from gpt.errors import UserError
from gpt.utils.atomic_io import fsync
from gpt.utils.folder_lock import hold_lock
from gpt.utils.helper import first_line

log = logging.getLogger(__name__)

READ_ONLY = (errno.EROFS, errno.EACCES, errno.EPERM)
"""Errors of a cache that this user may only read."""
DOCUMENTS_PER_GROUP = 2**16
"""Documents that are packed together."""

Int64s = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Packing:
    """The pieces of a token stream that make up each sequence.

    Sequence r consists of the pieces row_offsets[r] ... row_offsets[r + 1] - 1, each of them a document or a part of
    one. The arrays have the names of the tensors in the file.
    """

    starts: Int64s
    """(pieces,): position of the first token."""
    lengths: Int64s
    """(pieces,): tokens."""
    targets: Int64s
    """(pieces,): tokens to predict: all of the piece but the first, and the one after it. After the last token of a
    document comes end-of-text, if there is one."""
    row_offsets: Int64s
    """(sequences + 1,): number of the first piece of each sequence."""
    target_sums: Int64s
    """(sequences + 1,): targets in all sequences before each."""

    @property
    def n_sequences(self) -> int:
        """Packed sequences."""
        return len(self.row_offsets) - 1


def load_or_pack(stream: TokenStream, block_size: int, *, ends_are_targets: bool, path: Path) -> Packing:
    """Load the packing that is saved in `path`, packed and saved first if there is none.

    Args:
        stream: the documents.
        block_size: length of a sequence.
        ends_are_targets: an end-of-text token follows each document.
        path: a safetensors file whose name stands for all of the above.

    Raises:
        UserError: the file cannot be read or written, or was changed.
    """
    try:
        if path.exists():  # it needs no lock, and may be in a read-only cache
            return _load(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        with hold_lock(path.with_suffix(".lock")):
            if not path.exists():
                _save(pack(stream, block_size, ends_are_targets=ends_are_targets), path)
            return _load(path)
    except (OSError, SafetensorError) as error:
        if isinstance(error, OSError) and error.errno in READ_ONLY:
            log.warning(f"{path}: {error.strerror}; the documents are packed again at each start")
            return pack(stream, block_size, ends_are_targets=ends_are_targets)
        raise UserError(
            f"{path}: {first_line(error)}; delete it if it is there, or name another --data.cache-dir"
        ) from error


def _save(packing: Packing, path: Path) -> None:
    tensors: dict[str, Int64s] = vars(packing)
    unfinished = path.with_suffix(".tmp")
    unfinished.touch()
    mode = unfinished.stat().st_mode
    save_file(tensors, unfinished, metadata={"sha256": _digest(tensors)})
    unfinished.chmod(mode)  # save_file makes a file that only its owner can read, and users may share a cache
    fsync(unfinished)
    unfinished.replace(path)


def _load(path: Path) -> Packing:
    with safe_open(path, framework="numpy") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - it is no dict
        saved = (file.metadata() or {}).get("sha256")
    actual = _digest(tensors)
    if actual != saved:
        raise UserError(f"{path}: changed since it was packed: its SHA-256 is {actual}, not {saved}; delete it")
    return Packing(**tensors)


def _digest(tensors: Mapping[str, Int64s]) -> str:
    sha256 = hashlib.sha256()
    for name in sorted(tensors):
        sha256.update(f"{name} {tensors[name].dtype} {tensors[name].shape}".encode())
        sha256.update(tensors[name].data)
    return sha256.hexdigest()


def pack(stream: TokenStream, block_size: int, *, ends_are_targets: bool) -> Packing:
    """Pack all documents of a stream; the arguments are those of `load_or_pack`."""
    groups = [
        _pack_group(borders[:-1], borders[1:], block_size, ends_are_targets) for borders in _group_borders(stream)
    ]
    pieces_per_row = np.concatenate([np.zeros(1, np.int64), *(group.pieces_per_row for group in groups)])
    targets = np.concatenate([np.zeros(0, np.int64), *(group.targets for group in groups)])
    row_offsets = np.cumsum(pieces_per_row)
    sums = np.concatenate([np.zeros(1, np.int64), np.cumsum(targets)])
    return Packing(
        starts=np.concatenate([np.zeros(0, np.int64), *(group.starts for group in groups)]),
        lengths=np.concatenate([np.zeros(0, np.int64), *(group.lengths for group in groups)]),
        targets=targets,
        row_offsets=row_offsets,
        target_sums=sums[row_offsets],
    )


@dataclass(frozen=True)
class _PackedGroup:
    """The sequences of one group of documents."""

    starts: Int64s
    lengths: Int64s
    targets: Int64s
    pieces_per_row: Int64s
    """Pieces of each sequence."""


def _group_borders(stream: TokenStream) -> Iterator[Int64s]:
    """Yield the positions where documents begin, in groups; the last of a group is where its last document ends."""
    pending = np.zeros(0, np.int64)
    for borders in stream.iter_document_borders():
        pending = np.concatenate([pending, borders])
        while len(pending) > DOCUMENTS_PER_GROUP + 1:
            yield pending[: DOCUMENTS_PER_GROUP + 1]
            pending = pending[DOCUMENTS_PER_GROUP:]
    if len(pending) > 1:
        yield pending


def _pack_group(starts: Int64s, ends: Int64s, block_size: int, ends_are_targets: bool) -> _PackedGroup:
    full = (ends - starts) // block_size
    rests = (ends - starts) % block_size
    within = np.arange(full.sum()) - np.repeat(np.cumsum(full) - full, full)  # number of the piece in its document
    full_starts = np.repeat(starts, full) + within * block_size
    ends_document = full_starts + block_size == np.repeat(ends, full)
    rest_starts, rest_lengths = (ends - rests)[rests > 0], rests[rests > 0]

    order = np.argsort(-rest_lengths, kind="stable")
    rows = _best_fit(rest_lengths[order].tolist(), block_size)
    packed = order[[piece for row in rows for piece in row]] if rows else order
    missing = 0 if ends_are_targets else 1  # targets of a document's last token
    return _PackedGroup(
        starts=np.concatenate([full_starts, rest_starts[packed]]),
        lengths=np.concatenate([np.full(len(full_starts), block_size), rest_lengths[packed]]),
        targets=np.concatenate([block_size - missing * ends_document, rest_lengths[packed] - missing]),
        pieces_per_row=np.array([1] * len(full_starts) + [len(row) for row in rows], dtype=np.int64),
    )


def _best_fit(lengths: list[int], capacity: int) -> list[list[int]]:
    """Pack items of the given lengths, longest first, each into the row where the least room remains.

    >>> _best_fit([5, 4, 3, 2, 2], capacity=8)
    [[0, 2], [1, 3, 4]]

    Args:
        lengths: lengths of the items, descending.
        capacity: length of a row.

    Returns:
        rows of indices into `lengths`.
    """
    # Bit r of `rooms` is set if some row has room for exactly r more, so the best fit is the lowest set bit above.
    rows: list[list[int]] = []
    rows_with_room: list[list[int]] = [[] for _ in range(capacity + 1)]
    rooms = 0
    for index, length in enumerate(lengths):
        fitting = rooms >> length
        if fitting:
            room = length + (fitting & -fitting).bit_length() - 1
            row = rows_with_room[room].pop()
            if not rows_with_room[room]:
                rooms ^= 1 << room
        else:
            room, row = capacity, len(rows)
            rows.append([])
        rows[row].append(index)
        left = room - length
        if left:
            rows_with_room[left].append(row)
            rooms |= 1 << left
    return rows
