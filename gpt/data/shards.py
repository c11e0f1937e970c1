"""Shards: safetensors files of tokens, with the offsets of documents and digests that verify the tokens block by block.

    document_offsets  uint64, (n_documents + 1,): document d is tokens[offsets[d]:offsets[d + 1]]
    document_bytes    uint64, (n_documents,): length of its text as UTF-8
    block_digests     uint64, (n_blocks,): the first 8 bytes of the SHA-256 of each BLOCK_BYTES of the tokens
    tokens            uint16 or uint32, (n_tokens,)

If the tokenizer has an end-of-text token, each document begins with one, so that every token of its text is a target.
The format is safetensors because anyone can open it, its header is checked, and its tensors can be mapped.

Digests form a chain: the corpus's manifest has the digest of a shard's index, which is everything before the tokens,
and the index has the digests of the blocks of tokens. So reading a window verifies only the blocks that it lies in, and
a run starts without reading the corpus.
"""

import hashlib
import json
import os
import shutil
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from itertools import accumulate
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np
import numpy.typing as npt
from pydantic import Field

from gpt.configs.base import Config
from gpt.errors import UserError
from gpt.utils.atomic_io import fsync
from gpt.utils.helper import sha256_of_file
from gpt.utils.safetensors_file import LENGTH_BYTES, TensorEntry, encode_header, read_header

Tokens = npt.NDArray[np.integer[Any]]

BLOCK_BYTES = 2**14
"""Bytes of tokens that are verified together: few, since in a large corpus most windows need a block not yet read."""

MAX_HEADER_BYTES = 2**16
"""Limit for the header; its few tensors need some hundreds of bytes."""

_DTYPES: dict[str, type[np.unsignedinteger[Any]]] = {"U16": np.uint16, "U32": np.uint32, "U64": np.uint64}


class ShardInfo(Config):
    """A shard's entry in the corpus's manifest."""

    file: str = Field(pattern=r"^[\w-]+\.safetensors$")
    sha256: str
    index_sha256: str
    """Digest of everything before the tokens."""
    size: int = Field(ge=0)
    """Bytes of the file."""
    tokens: int = Field(ge=0)
    documents: int = Field(ge=0)
    """Documents that begin here."""
    text_bytes: int = Field(ge=0)
    largest_id: int = Field(ge=0)
    continues: bool = False
    """The first document is a further piece of the last one of the shard before."""


def choose_token_dtype(vocab_size: int) -> npt.DTypeLike:
    """Return the smallest type that holds every id."""
    return np.uint16 if vocab_size <= 2**16 else np.uint32


class ShardWriter:
    """Writer of one shard. Tokens go to the disk as they come, so a shard may be larger than memory.

    The file appears when `finish` is called; leaving the `with` block without that leaves nothing behind.

    Args:
        path: of the shard.
        vocab_size: every id is below it.
        continues: the first document is a further piece of the last one of the shard before.
    """

    def __init__(self, path: Path, vocab_size: int, *, continues: bool = False):
        self._path, self._vocab_size, self._continues = path, vocab_size, continues
        self._dtype = np.dtype(choose_token_dtype(vocab_size))
        self._spool = path.with_suffix(".tokens")
        self._unfinished = path.with_suffix(".tmp")
        self._file = self._spool.open("wb")
        self._lengths: list[int] = []
        self._text_bytes: list[int] = []
        self._largest = 0

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Remove unfinished files."""
        try:
            self._file.close()
        except OSError:
            if error is None:  # otherwise the block has already raised for the same full disk
                raise
        finally:
            self._spool.unlink(missing_ok=True)
            self._unfinished.unlink(missing_ok=True)

    def add(self, ids: Tokens, text_bytes: int, *, start: Tokens | None = None) -> None:
        """Append a document.

        Args:
            ids: the document's tokens.
            text_bytes: length of its text in UTF-8.
            start: ids to put before the document.

        Raises:
            UserError: an id is not below `vocab_size`; a smaller type would silently turn it into another id.
        """
        pieces = [ids] if start is None else [start, ids]
        for piece in pieces:
            self._check_ids(piece)
            self._file.write(piece.astype(self._dtype).data)
        self._lengths.append(sum(map(len, pieces)))
        self._text_bytes.append(text_bytes)

    def _check_ids(self, ids: Tokens) -> None:
        if len(ids):
            largest, smallest = int(ids.max()), int(ids.min())
            if largest >= self._vocab_size or smallest < 0:
                invalid = smallest if smallest < 0 else largest
                raise UserError(f"token {invalid} is not in a vocabulary of {self._vocab_size}")
            self._largest = max(self._largest, largest)

    def finish(self) -> ShardInfo | None:
        """Write the file, down to the disk, and return its entry; None, and no file, if there was no document."""
        self._file.close()
        if not self._lengths:
            return None
        index = self._encode_index()
        with self._unfinished.open("wb") as file, self._spool.open("rb") as tokens:
            file.write(index)
            shutil.copyfileobj(tokens, file, 2**20)
        fsync(self._unfinished)
        info = ShardInfo(
            file=self._path.name,
            sha256=sha256_of_file(self._unfinished),
            index_sha256=hashlib.sha256(index).hexdigest(),
            size=self._unfinished.stat().st_size,
            tokens=sum(self._lengths),
            documents=len(self._lengths) - self._continues,
            text_bytes=sum(self._text_bytes),
            largest_id=self._largest,
            continues=self._continues,
        )
        self._unfinished.replace(self._path)
        return info

    def _encode_index(self) -> bytes:
        """Return everything before the tokens: 8 bytes of header length, the header, and the small tensors."""
        arrays = {
            "document_offsets": np.array([0, *accumulate(self._lengths)], dtype=np.uint64),
            "document_bytes": np.array(self._text_bytes, dtype=np.uint64),
            "block_digests": _digest_blocks(self._spool),
        }
        n_tokens, dtype = sum(self._lengths), "U16" if self._dtype.itemsize == 2 else "U32"
        entries = [TensorEntry(name, "U64", [len(array)], array.nbytes) for name, array in arrays.items()]
        entries.append(TensorEntry("tokens", dtype, [n_tokens], n_tokens * self._dtype.itemsize))
        header = encode_header(entries, {"format": "gpt-training-pipeline tokens, version 2"}, compact=False)
        return b"".join([header, *(array.tobytes() for array in arrays.values())])


class TokenStream:
    """The tokens of some shards as one long sequence, memory-mapped, and verified when they are first read.

    Args:
        shards: folder and entry of each shard, in order.
        vocab_size: every id is below it.
    """

    def __init__(self, shards: Sequence[tuple[Path, ShardInfo]], vocab_size: int):
        """Check the sizes of the shards, and open none.

        Raises:
            UserError: a file is missing or does not have the size in its entry, or an id is not in the vocabulary.
        """
        for folder, shard in shards:
            _check_size(folder, shard)
            if shard.largest_id >= vocab_size:
                raise _too_large_id_error(_Shard(folder / shard.file, shard, vocab_size), vocab_size)
        self._shards, self._vocab_size = shards, vocab_size
        self._opened: dict[int, _Shard] = {}
        self._starts = [0, *accumulate(shard.tokens for _, shard in shards)]
        self.text_bytes = sum(shard.text_bytes for _, shard in shards)
        """Length of the text in UTF-8."""
        self.n_documents = sum(shard.documents for _, shard in shards)

    def __len__(self) -> int:
        return self._starts[-1]

    def read(self, start: int, length: int) -> Tokens:
        """Read `length` tokens from position `start`, across shards if need be.

        Raises:
            UserError: the tokens were changed since they were prepared.
        """
        assert 0 <= start <= start + length <= len(self)
        index = bisect_right(self._starts, start) - 1
        if length and start + length <= self._starts[index + 1]:  # the usual case
            return self._shard(index).read(start - self._starts[index], start - self._starts[index] + length)
        pieces = [self._shard(index).read(first, stop) for index, first, stop in self._span(start, length)]
        return pieces[0] if len(pieces) == 1 else np.concatenate([np.array([], np.uint16), *pieces])

    def find_document_starts(self, start: int, length: int) -> npt.NDArray[np.int64]:
        """Return where documents begin in the `length` tokens from position `start`, ascending and relative to it.

        Raises:
            UserError: the shard was changed since it was prepared.
        """
        starts = [np.array([], np.int64)]
        for index, first, stop in self._span(start, length):
            begins = self._shard(index).begins
            # In the array's own type: to compare with Python's integers, numpy would convert all of it to floats.
            inside = begins[slice(*np.searchsorted(begins, np.array([first, stop], begins.dtype)))]
            starts.append(inside.astype(np.int64) + (self._starts[index] - start))
        return np.concatenate(starts)

    def locate(self, start: int) -> tuple[Path, int, int]:
        """Return the shard of position `start`, the number of the document there, and the token's offset in it.

        Raises:
            UserError: the shard was changed since it was prepared.
        """
        ((index, first, _),) = self._span(start, 1)
        folder, info = self._shards[index]
        begins = self._shard(index).begins
        number = int(np.searchsorted(begins, np.array(first, begins.dtype), side="right")) - 1
        before = int(begins[number]) if number >= 0 else 0
        return folder / info.file, number + info.continues, first - before

    def iter_document_borders(self) -> Iterator[npt.NDArray[np.int64]]:
        """Yield the positions where documents begin, shard by shard, and at last the end of the stream."""
        for index, start in enumerate(self._starts[:-1]):
            yield self._shard(index).begins.astype(np.int64) + start
        yield np.array([len(self)])

    def _span(self, start: int, length: int) -> Iterator[tuple[int, int, int]]:
        """Yield (shard, first, stop) for the parts of a range."""
        index = bisect_right(self._starts, start) - 1
        while length > 0:
            first = start - self._starts[index]
            stop = min(first + length, self._shards[index][1].tokens)
            if stop > first:
                yield index, first, stop
            start, length, index = start + stop - first, length - (stop - first), index + 1

    def _shard(self, index: int) -> "_Shard":
        shard = self._opened.get(index)
        if shard is None:
            folder, info = self._shards[index]
            shard = self._opened[index] = _Shard(folder / info.file, info, self._vocab_size)
        return shard


class _Shard:
    """A mapped shard."""

    def __init__(self, path: Path, info: ShardInfo, vocab_size: int):
        self.path, self._vocab_size = path, vocab_size
        try:
            header, header_size, index_sha256 = _read_index(path)
            content = np.asarray(np.memmap(path, mode="r"))  # a plain array is sliced several times faster
            arrays = {name: _map_tensor(content, header_size, header[name]) for name in _TENSORS}
        except (ValueError, KeyError, TypeError, IndexError, OverflowError, RecursionError) as error:
            raise UserError(f"{path}: damaged; {_remedy(path)}") from error
        if index_sha256 != info.index_sha256:
            raise UserError(
                f"{path}: changed since it was prepared: SHA-256 of its index is {index_sha256}, "
                f"not {info.index_sha256}; "
                f"{_remedy(path)}"
            )
        self.tokens: Tokens = arrays["tokens"]
        self.begins = arrays["document_offsets"][int(info.continues) : -1]
        """Offsets at which documents begin."""
        self._digests = arrays["block_digests"]
        self._verified = bytearray(len(self._digests))
        self._per_block = BLOCK_BYTES // self.tokens.itemsize

    def read(self, first: int, stop: int) -> Tokens:
        """Return tokens[first:stop], verified."""
        blocks = range(first // self._per_block, (stop - 1) // self._per_block + 1)
        if 0 in self._verified[blocks.start : blocks.stop]:
            self._verify(blocks)
        return self.tokens[first:stop]

    def _verify(self, blocks: range) -> None:
        for block in blocks:
            first = block * self._per_block
            tokens = self.tokens[first : first + self._per_block]
            digest = _digest_block(tokens.data)
            if digest != self._digests[block]:
                invalid = _find_too_large_id(tokens, self._vocab_size)
                detail = (
                    ""
                    if invalid is None
                    else f", token {invalid[1]} at offset {first + invalid[0]} is not in the vocabulary"
                )
                raise UserError(
                    f"{self.path}: changed since it was prepared: tokens {first} to {first + len(tokens) - 1} have "
                    f"digest {digest:016x}, not {int(self._digests[block]):016x}{detail}; {_remedy(self.path)}"
                )
            self._verified[block] = 1


_TENSORS = ("document_offsets", "block_digests", "tokens")


def _read_index(path: Path) -> tuple[dict[str, Any], int, str]:
    """Return the header, its size, and the SHA-256 of the index; the file is read, not mapped, to leave memory free."""
    with path.open("rb") as file:
        text = read_header(file, MAX_HEADER_BYTES)
        header = json.loads(text)
        digest = hashlib.sha256(len(text).to_bytes(LENGTH_BYTES, "little") + text)
        remaining = int(header["tokens"]["data_offsets"][0])
        while remaining > 0 and (block := file.read(min(remaining, 2**20))):
            digest.update(block)
            remaining -= len(block)
    return header, len(text), digest.hexdigest()


def _map_tensor(content: npt.NDArray[np.uint8], header_size: int, entry: dict[str, Any]) -> npt.NDArray[Any]:
    """Return a tensor of a mapped safetensors file (8 bytes of header length, a JSON header, the data)."""
    first, stop = (LENGTH_BYTES + header_size + int(offset) for offset in entry["data_offsets"])
    return content[first:stop].view(_DTYPES[entry["dtype"]]).reshape(entry["shape"])


def _digest_blocks(tokens: Path) -> npt.NDArray[np.uint64]:
    with tokens.open("rb") as file:
        return np.array([_digest_block(block) for block in iter(lambda: file.read(BLOCK_BYTES), b"")], dtype=np.uint64)


def _digest_block(block: bytes | memoryview) -> int:
    return int.from_bytes(hashlib.sha256(block).digest()[:8], "little")


def _find_too_large_id(tokens: Tokens, vocab_size: int) -> tuple[int, int] | None:
    """Return (offset, id) of the first token that is not below `vocab_size`."""
    too_large = tokens >= vocab_size
    at = int(too_large.argmax()) if len(too_large) else 0
    return (at, int(tokens[at])) if len(too_large) and too_large[at] else None


def _too_large_id_error(shard: _Shard, vocab_size: int) -> UserError:
    invalid = _find_too_large_id(shard.tokens, vocab_size)
    place = f"token {invalid[1]} at offset {invalid[0]}" if invalid else "its largest id"
    path = shard.path
    return UserError(f"{path}: {place} is not in the tokenizer's vocabulary of {vocab_size}; {_remedy(path)}")


def _check_size(folder: Path, shard: ShardInfo) -> None:
    try:
        # A corpus may have tens of thousands of shards, and pathlib takes ten times as long.
        size = os.stat(os.path.join(folder, shard.file)).st_size  # noqa: PTH116, PTH118
    except FileNotFoundError:
        size = None
    if size != shard.size:
        path = folder / shard.file
        state = "is missing" if size is None else f"has {size} bytes instead of {shard.size}"
        raise UserError(f"{path}: the prepared shard {state}; {_remedy(path)}")


def _remedy(path: Path) -> str:
    return f"delete the folder {path.parent} and prepare it again"
