"""The token file: a safetensors file that holds tokens, where documents begin, and digests to check it block by block.

    document_offsets  uint64, (n_documents + 1,): document d is tokens[offsets[d]:offsets[d + 1]]
    document_bytes    uint64, (n_documents,): length of its text as UTF-8
    block_digests     uint64, (n_blocks,): the first 8 bytes of the SHA-256 of each BLOCK_BYTES of the tokens
    tokens            uint16 or uint32, (n_tokens,)

Where the tokenizer has an end-of-text token, each document begins with one, so that every token of its text is a
target. Safetensors because anyone can open it, its header is checked, and its tensors can be mapped as they lie.

The corpus's manifest holds the digest of all that comes before the tokens, and that part the digests of the tokens'
blocks: so a window is known to be what was prepared after reading the blocks that it lies in, and a run starts
without reading the corpus.
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
"""What is verified at once: small, for a window of a large corpus is mostly the first that is read of its block."""

MAX_HEADER_BYTES = 2**16
"""Bytes; a few tensors need some hundreds."""

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
    """Its first document is a further piece of the last one of the shard before it."""


def token_dtype(vocab_size: int) -> npt.DTypeLike:
    """The smallest type that holds every id."""
    return np.uint16 if vocab_size <= 2**16 else np.uint32


class ShardWriter:
    """Writes one shard; tokens go to the disk as they come, so that a shard may be larger than memory.

    The file appears when `finish` is called; leaving the block without that leaves nothing.

    Args:
        path: of the shard.
        vocab_size: every id is below it.
        continues: the first document is a further piece of the last one of the shard before.
    """

    def __init__(self, path: Path, vocab_size: int, *, continues: bool = False):
        self._path, self._vocab_size, self._continues = path, vocab_size, continues
        self._dtype = np.dtype(token_dtype(vocab_size))
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
        """Remove what is unfinished."""
        try:
            self._file.close()
        except OSError:
            if error is None:  # a full disk, which the block has met already otherwise
                raise
        finally:
            self._spool.unlink(missing_ok=True)
            self._unfinished.unlink(missing_ok=True)

    def add(self, ids: Tokens, text_bytes: int, *, start: Tokens | None = None) -> None:
        """Append a document, after the token that `start` may hold.

        Raises:
            UserError: an id is not below `vocab_size`; written into a smaller type it would silently become another.
        """
        pieces = [ids] if start is None else [start, ids]
        for piece in pieces:
            self._check(piece)
            self._file.write(piece.astype(self._dtype).data)
        self._lengths.append(sum(map(len, pieces)))
        self._text_bytes.append(text_bytes)

    def _check(self, ids: Tokens) -> None:
        if len(ids):
            largest, smallest = int(ids.max()), int(ids.min())
            if largest >= self._vocab_size or smallest < 0:
                wrong = smallest if smallest < 0 else largest
                raise UserError(f"token {wrong} is not in a vocabulary of {self._vocab_size}")
            self._largest = max(self._largest, largest)

    def finish(self) -> ShardInfo | None:
        """Write the file, to the disk; None, and no file, if there was no document."""
        self._file.close()
        if not self._lengths:
            return None
        index = self._index()
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

    def _index(self) -> bytes:
        """Everything before the tokens: 8 bytes of header length, the header, and the small tensors."""
        arrays = {
            "document_offsets": np.array([0, *accumulate(self._lengths)], dtype=np.uint64),
            "document_bytes": np.array(self._text_bytes, dtype=np.uint64),
            "block_digests": _block_digests(self._spool),
        }
        n_tokens, dtype = sum(self._lengths), "U16" if self._dtype.itemsize == 2 else "U32"
        entries = [TensorEntry(name, "U64", [len(array)], array.nbytes) for name, array in arrays.items()]
        entries.append(TensorEntry("tokens", dtype, [n_tokens], n_tokens * self._dtype.itemsize))
        header = encode_header(entries, {"format": "gpt-training-pipeline tokens, version 2"}, compact=False)
        return b"".join([header, *(array.tobytes() for array in arrays.values())])


class TokenStream:
    """The tokens of some shards as one long sequence, memory-mapped and verified as they are first read.

    Args:
        shards: the folder and the entry of each, in order.
        vocab_size: every id is below it.
    """

    def __init__(self, shards: Sequence[tuple[Path, ShardInfo]], vocab_size: int):
        """Look at the shards' sizes, and open none.

        Raises:
            UserError: a file is missing or has not the size that the manifest gives, or an id is beyond the vocabulary.
        """
        for folder, shard in shards:
            _check_size(folder, shard)
            if shard.largest_id >= vocab_size:
                raise UserError(_beyond(_Shard(folder / shard.file, shard, vocab_size), vocab_size))
        self._shards, self._vocab_size = shards, vocab_size
        self._opened: dict[int, _Shard] = {}
        self._starts = [0, *accumulate(shard.tokens for _, shard in shards)]
        self.text_bytes = sum(shard.text_bytes for _, shard in shards)
        """Length of the text as UTF-8."""
        self.n_documents = sum(shard.documents for _, shard in shards)

    def __len__(self) -> int:
        return self._starts[-1]

    def read(self, start: int, length: int) -> Tokens:
        """`length` tokens from position `start`, across shards where need be.

        Raises:
            UserError: they are not what was prepared.
        """
        assert 0 <= start <= start + length <= len(self)
        index = bisect_right(self._starts, start) - 1
        if length and start + length <= self._starts[index + 1]:  # nearly always
            return self._shard(index).read(start - self._starts[index], start - self._starts[index] + length)
        pieces = [self._shard(index).read(first, stop) for index, first, stop in self._span(start, length)]
        return pieces[0] if len(pieces) == 1 else np.concatenate([np.array([], np.uint16), *pieces])

    def document_starts(self, start: int, length: int) -> npt.NDArray[np.int64]:
        """Where documents begin in the `length` tokens from position `start`, ascending and relative to it.

        Raises:
            UserError: the shard is not what was prepared.
        """
        found = [np.array([], np.int64)]
        for index, first, stop in self._span(start, length):
            begins = self._shard(index).begins
            # As the array's own type: to compare with Python's integers numpy would make floats of all of it.
            inside = begins[slice(*np.searchsorted(begins, np.array([first, stop], begins.dtype)))]
            found.append(inside.astype(np.int64) + (self._starts[index] - start))
        return np.concatenate(found)

    def locate(self, start: int) -> tuple[Path, int, int]:
        """Where position `start` lies: the shard, the number of the document there, the token's place in it.

        Raises:
            UserError: the shard is not what was prepared.
        """
        ((index, first, _),) = self._span(start, 1)
        folder, info = self._shards[index]
        begins = self._shard(index).begins
        number = int(np.searchsorted(begins, np.array(first, begins.dtype), side="right")) - 1
        before = int(begins[number]) if number >= 0 else 0
        return folder / info.file, number + info.continues, first - before

    def document_borders(self) -> Iterator[npt.NDArray[np.int64]]:
        """For shard after shard where its documents begin, and at last the end of the stream."""
        for index, start in enumerate(self._starts[:-1]):
            yield self._shard(index).begins.astype(np.int64) + start
        yield np.array([len(self)])

    def _span(self, start: int, length: int) -> Iterator[tuple[int, int, int]]:
        """(shard, first, stop) of the pieces that make up a range."""
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
    """One mapped file."""

    def __init__(self, path: Path, info: ShardInfo, vocab_size: int):
        self._path, self._vocab_size = path, vocab_size
        try:
            header, header_size, found = _read_index(path)
            content = np.asarray(np.memmap(path, mode="r"))  # a plain array is sliced several times faster
            arrays = {name: _tensor(content, header_size, header[name]) for name in _TENSORS}
        except (ValueError, KeyError, TypeError, IndexError, OverflowError, RecursionError) as error:
            raise UserError(f"{path}: damaged; {_remedy(path)}") from error
        if found != info.index_sha256:
            raise UserError(
                f"{path}: changed since it was prepared: SHA-256 of its index is {found}, not {info.index_sha256}; "
                f"{_remedy(path)}"
            )
        self.tokens: Tokens = arrays["tokens"]
        self.begins = arrays["document_offsets"][int(info.continues) : -1]
        """Where documents begin."""
        self._digests = arrays["block_digests"]
        self._verified = bytearray(len(self._digests))
        self._per_block = BLOCK_BYTES // self.tokens.itemsize

    def read(self, first: int, stop: int) -> Tokens:
        """tokens[first:stop], verified."""
        blocks = range(first // self._per_block, (stop - 1) // self._per_block + 1)
        if 0 in self._verified[blocks.start : blocks.stop]:
            self._verify(blocks)
        return self.tokens[first:stop]

    def _verify(self, blocks: range) -> None:
        for block in blocks:
            first = block * self._per_block
            tokens = self.tokens[first : first + self._per_block]
            found = _digest(tokens.data)
            if found != self._digests[block]:
                beyond = _first_beyond(tokens, self._vocab_size)
                told = "" if beyond is None else f", token {beyond[1]} at offset {first + beyond[0]} is no token at all"
                raise UserError(
                    f"{self._path}: changed since it was prepared: tokens {first} to {first + len(tokens) - 1} have "
                    f"digest {found:016x}, not {int(self._digests[block]):016x}{told}; {_remedy(self._path)}"
                )
            self._verified[block] = 1

    def first_beyond(self, vocab_size: int) -> tuple[int, int] | None:
        """(offset, id) of the first token that is not below `vocab_size`."""
        return _first_beyond(self.tokens, vocab_size)


_TENSORS = ("document_offsets", "block_digests", "tokens")


def _read_index(path: Path) -> tuple[dict[str, Any], int, str]:
    """Header, its size, and the digest of all that comes before the tokens; read, not mapped, to leave memory free."""
    with path.open("rb") as file:
        text = read_header(file, MAX_HEADER_BYTES)
        header = json.loads(text)
        digest = hashlib.sha256(len(text).to_bytes(LENGTH_BYTES, "little") + text)
        left = int(header["tokens"]["data_offsets"][0])
        while left > 0 and (block := file.read(min(left, 2**20))):
            digest.update(block)
            left -= len(block)
    return header, len(text), digest.hexdigest()


def _tensor(content: npt.NDArray[np.uint8], header_size: int, entry: dict[str, Any]) -> npt.NDArray[Any]:
    """A tensor of a mapped safetensors file (8 bytes of header length, a JSON header, the data)."""
    first, stop = (LENGTH_BYTES + header_size + int(offset) for offset in entry["data_offsets"])
    return content[first:stop].view(_DTYPES[entry["dtype"]]).reshape(entry["shape"])


def _block_digests(tokens: Path) -> npt.NDArray[np.uint64]:
    with tokens.open("rb") as file:
        return np.array([_digest(block) for block in iter(lambda: file.read(BLOCK_BYTES), b"")], dtype=np.uint64)


def _digest(block: bytes | memoryview) -> int:
    return int.from_bytes(hashlib.sha256(block).digest()[:8], "little")


def _first_beyond(tokens: Tokens, vocab_size: int) -> tuple[int, int] | None:
    beyond = tokens >= vocab_size
    at = int(beyond.argmax()) if len(beyond) else 0
    return (at, int(tokens[at])) if len(beyond) and beyond[at] else None


def _beyond(shard: _Shard, vocab_size: int) -> str:
    at = shard.first_beyond(vocab_size)
    place = f"token {at[1]} at offset {at[0]}" if at else "its largest id"
    return f"{shard._path}: {place} is not in the tokenizer's vocabulary of {vocab_size}; {_remedy(shard._path)}"


def _check_size(folder: Path, shard: ShardInfo) -> None:
    try:
        # There may be ten thousands of them, and pathlib takes ten times as long.
        found = os.stat(os.path.join(folder, shard.file)).st_size  # noqa: PTH116, PTH118
    except FileNotFoundError:
        found = None
    if found != shard.size:
        path = folder / shard.file
        state = "is missing" if found is None else f"has {found} bytes instead of {shard.size}"
        raise UserError(f"{path}: the prepared shard {state}; {_remedy(path)}")


def _remedy(path: Path) -> str:
    return f"delete the folder {path.parent} and prepare it again"
