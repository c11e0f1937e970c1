"""The token file: a safetensors file that holds tokens, document offsets and the documents' byte counts.

    tokens            uint16 or uint32, (n_tokens,)
    document_offsets  uint64, (n_documents + 1,): document d is tokens[offsets[d]:offsets[d + 1]]
    document_bytes    uint64, (n_documents,): length of its text as UTF-8

Where the tokenizer has an end-of-text token, each document begins with one, so that every token of its text is a
target. Safetensors because anyone can open it, its header is checked, and its tensors can be mapped as they lie.
"""

import json
from bisect import bisect_right
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from safetensors.numpy import save_file

from gpt.data.tokenizer import Ids
from gpt.errors import UserError
from gpt.utils.helper import sha256_of_file

SHARD_TOKENS = 2**26
"""Tokens after which a new shard begins: 128 MiB as uint16."""

_DTYPES: dict[str, type[np.unsignedinteger[Any]]] = {"U16": np.uint16, "U32": np.uint32}


@dataclass(frozen=True)
class ShardInfo:
    """A shard's entry in the corpus's manifest."""

    file: str
    sha256: str
    size: int
    """Bytes of the file."""
    tokens: int
    documents: int
    text_bytes: int
    largest_id: int


def token_dtype(vocab_size: int) -> npt.DTypeLike:
    """The smallest type that holds every id."""
    return np.uint16 if vocab_size <= 2**16 else np.uint32


def write_shards(
    folder: Path,
    split: str,
    documents: Iterable[tuple[Ids, int]],
    dtype: npt.DTypeLike,
    limit: int = SHARD_TOKENS,
) -> list[ShardInfo]:
    """Write (ids, text bytes) of documents as `split-NNNNN.safetensors`; a document is never cut."""
    return [
        _write_shard(folder / f"{split}-{index:05d}.safetensors", batch, dtype)
        for index, batch in enumerate(_in_shards(documents, limit))
    ]


def _in_shards(documents: Iterable[tuple[Ids, int]], limit: int) -> Iterator[list[tuple[Ids, int]]]:
    batch: list[tuple[Ids, int]] = []
    held = 0
    for ids, n_bytes in documents:
        if batch and held + len(ids) > limit:
            yield batch
            batch, held = [], 0
        batch.append((ids, n_bytes))
        held += len(ids)
    if batch:
        yield batch


def _write_shard(path: Path, documents: Sequence[tuple[Ids, int]], dtype: npt.DTypeLike) -> ShardInfo:
    tokens = np.concatenate([ids for ids, _ in documents])
    text_bytes = np.array([n_bytes for _, n_bytes in documents], dtype=np.uint64)
    largest = int(tokens.max(initial=0))
    assert largest <= np.iinfo(dtype).max, "token_dtype was not asked"
    arrays = {
        "tokens": tokens.astype(dtype),
        "document_offsets": np.array([0, *accumulate(len(ids) for ids, _ in documents)], dtype=np.uint64),
        "document_bytes": text_bytes,
    }
    # One key alone: the library writes several in an order that differs from call to call.
    save_file(arrays, path, metadata={"format": "gpt-training-pipeline tokens, version 1"})
    return ShardInfo(
        file=path.name,
        sha256=sha256_of_file(path),
        size=path.stat().st_size,
        tokens=len(tokens),
        documents=len(documents),
        text_bytes=int(text_bytes.sum()),
        largest_id=largest,
    )


class TokenStream:
    """The tokens of some shards as one long sequence, memory-mapped."""

    def __init__(self, folder: Path, shards: Sequence[ShardInfo]):
        """Map the shards.

        Raises:
            UserError: a file is missing, damaged, or has not the size that the manifest gives.
        """
        for shard in shards:
            _check_size(folder / shard.file, shard.size)
        self._tokens = [_map_tokens(folder / shard.file) for shard in shards]
        self._starts = [0, *accumulate(len(tokens) for tokens in self._tokens)]

    def __len__(self) -> int:
        return self._starts[-1]

    def read(self, start: int, length: int) -> npt.NDArray[np.integer[Any]]:
        """`length` tokens from position `start`, across shards where need be."""
        assert 0 <= start <= start + length <= len(self)
        shard = bisect_right(self._starts, start) - 1
        offset = start - self._starts[shard]
        piece = self._tokens[shard][offset : offset + length]
        if len(piece) == length:
            return piece
        pieces = [piece]
        while (missing := length - sum(map(len, pieces))) > 0:
            shard += 1
            pieces.append(self._tokens[shard][:missing])
        return np.concatenate(pieces)


def shard_to_json(shard: ShardInfo) -> dict[str, Any]:
    """A manifest entry."""
    return asdict(shard)


def _check_size(path: Path, size: int) -> None:
    found = path.stat().st_size if path.exists() else None
    if found != size:
        state = "is missing" if found is None else f"has {found} bytes instead of {size}"
        raise UserError(f"{path}: the prepared shard {state}; delete the folder {path.parent} to prepare it again")


def _map_tokens(path: Path) -> npt.NDArray[np.integer[Any]]:
    """The tokens of a shard, mapped where its header says (8 bytes of header length, a JSON header, the data)."""
    try:
        with path.open("rb") as file:
            header_size = int.from_bytes(file.read(8), "little")
            entry = json.loads(file.read(header_size))["tokens"]
        offset, shape = 8 + header_size + entry["data_offsets"][0], tuple(entry["shape"])
        return np.memmap(path, dtype=_DTYPES[entry["dtype"]], mode="r", offset=offset, shape=shape)
    except (ValueError, KeyError, TypeError, OverflowError) as error:
        raise UserError(f"{path}: damaged; delete the folder {path.parent} to prepare it again") from error
