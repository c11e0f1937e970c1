"""Best-fit packing: whole documents in sequences of one length, with little padding.

Documents longer than a sequence are cut into full ones and a rest. Rests are packed by best fit, longest first, which
wastes the least of the simple rules (Ding et al. 2024, "Fewer Truncations Improve Language Modeling"): each goes where
the least room remains after it. Some thousands of documents are packed at a time, so memory is bounded and a document
is packed with neighbours.
"""

import hashlib
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

GROUP = 2**16
"""Documents that are packed together."""

Int64s = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Packing:
    """Which pieces of a token stream make up each sequence.

    Sequence r consists of the pieces row_offsets[r] ... row_offsets[r + 1] - 1. A piece predicts `targets` tokens: each
    of its own but the first, and the one after it; after a document's last token that is end-of-text, if there is one.
    """

    starts: Int64s
    lengths: Int64s
    targets: Int64s
    row_offsets: Int64s
    target_sums: Int64s
    """(rows + 1,): targets in all sequences before each."""

    @property
    def n_sequences(self) -> int:
        """Sequences."""
        return len(self.row_offsets) - 1


def packing_of(stream: TokenStream, block_size: int, *, ends_are_targets: bool, path: Path) -> Packing:
    """The packing kept in `path`, made first if it is not there.

    Args:
        stream: the documents.
        block_size: length of a sequence.
        ends_are_targets: an end-of-text token follows each document.
        path: a safetensors file; its name stands for all of the above.

    Raises:
        UserError: the file cannot be read or written, or is not what was written.
    """
    try:
        with hold_lock(path.with_suffix(".lock")):
            if not path.exists():
                _save(pack(stream, block_size, ends_are_targets=ends_are_targets), path)
            return _load(path)
    except (OSError, SafetensorError) as error:
        raise UserError(
            f"{path}: {first_line(error)}; delete it if it is there, or name another --data.cache-dir"
        ) from error


def _save(packing: Packing, path: Path) -> None:
    tensors: dict[str, Int64s] = vars(packing)
    unfinished = path.with_suffix(".tmp")
    save_file(tensors, unfinished, metadata={"sha256": _digest(tensors)})
    fsync(unfinished)
    unfinished.replace(path)


def _load(path: Path) -> Packing:
    with safe_open(path, framework="numpy") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - it is no dict
        claimed = (file.metadata() or {}).get("sha256")
    if (found := _digest(tensors)) != claimed:
        raise UserError(f"{path}: changed since it was made: its SHA-256 is {found}, not {claimed}; delete it")
    return Packing(**tensors)


def _digest(tensors: Mapping[str, Int64s]) -> str:
    sha256 = hashlib.sha256()
    for name in sorted(tensors):
        sha256.update(f"{name} {tensors[name].dtype} {tensors[name].shape}".encode())
        sha256.update(tensors[name].data)
    return sha256.hexdigest()


def pack(stream: TokenStream, block_size: int, *, ends_are_targets: bool) -> Packing:
    """Pack all documents of a stream."""
    groups: list[_Rows] = []
    for borders in _borders_in_groups(stream):
        starts, ends = borders[:-1], borders[1:]
        groups.append(_pack_group(starts, ends, block_size, ends_are_targets))
    row_lengths = np.concatenate([np.zeros(1, np.int64), *(group.row_lengths for group in groups)])
    targets = np.concatenate([np.zeros(0, np.int64), *(group.targets for group in groups)])
    row_offsets = np.cumsum(row_lengths)
    sums = np.concatenate([np.zeros(1, np.int64), np.cumsum(targets)])
    return Packing(
        starts=np.concatenate([np.zeros(0, np.int64), *(group.starts for group in groups)]),
        lengths=np.concatenate([np.zeros(0, np.int64), *(group.lengths for group in groups)]),
        targets=targets,
        row_offsets=row_offsets,
        target_sums=sums[row_offsets],
    )


@dataclass(frozen=True)
class _Rows:
    """Some sequences: their pieces, and how many pieces each has."""

    starts: Int64s
    lengths: Int64s
    targets: Int64s
    row_lengths: Int64s


def _borders_in_groups(stream: TokenStream) -> Iterator[Int64s]:
    """Beginnings of documents, about GROUP at a time, each group closed by the beginning of the next one."""
    held = np.zeros(0, np.int64)
    for borders in stream.document_borders():
        held = np.concatenate([held, borders])
        while len(held) > GROUP + 1:
            yield held[: GROUP + 1]
            held = held[GROUP:]
    if len(held) > 1:
        yield held


def _pack_group(starts: Int64s, ends: Int64s, block_size: int, ends_are_targets: bool) -> _Rows:
    full = (ends - starts) // block_size
    rests = (ends - starts) % block_size
    within = np.arange(full.sum()) - np.repeat(np.cumsum(full) - full, full)  # which full piece of its document
    full_starts = np.repeat(starts, full) + within * block_size
    full_ends = full_starts + block_size == np.repeat(ends, full)
    rest_starts, rest_lengths = (ends - rests)[rests > 0], rests[rests > 0]

    order = np.argsort(-rest_lengths, kind="stable")
    rows = _best_fit(rest_lengths[order].tolist(), block_size)
    packed = order[[piece for row in rows for piece in row]] if rows else order
    loss = 0 if ends_are_targets else 1
    return _Rows(
        starts=np.concatenate([full_starts, rest_starts[packed]]),
        lengths=np.concatenate([np.full(len(full_starts), block_size), rest_lengths[packed]]),
        targets=np.concatenate([block_size - loss * full_ends, rest_lengths[packed] - loss]),
        row_lengths=np.array([1] * len(full_starts) + [len(row) for row in rows], dtype=np.int64),
    )


def _best_fit(lengths: list[int], capacity: int) -> list[list[int]]:
    """Rows of indices; `lengths` descend. A set bit r of `rooms` says that some row has room for exactly r more."""
    rows: list[list[int]] = []
    with_room: list[list[int]] = [[] for _ in range(capacity + 1)]
    rooms = 0
    for index, length in enumerate(lengths):
        fitting = rooms >> length
        if fitting:
            room = length + (fitting & -fitting).bit_length() - 1
            row = with_room[room].pop()
            if not with_room[room]:
                rooms ^= 1 << room
        else:
            room, row = capacity, len(rows)
            rows.append([])
        rows[row].append(index)
        left = room - length
        if left:
            with_room[left].append(row)
            rooms |= 1 << left
    return rows
