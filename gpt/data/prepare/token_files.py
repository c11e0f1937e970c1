"""Files of tokens, as other projects write them. They are memory-mapped, never read at once.

    nanoGPT        raw uint16, recognised by the suffix .bin and content that is no text
    llm.c          256 int32 of header (magic, version, tokens), then uint16; uint32 for Llama 3; also modded-nanogpt
    Megatron       .bin of tokens; the .idx beside it has their type, the sequences, and the documents made of them
    numpy          .npy of one dimension of integers

All are little-endian, except that the header of .npy says which. A count is compared with the size of its file before
it is used.
"""

import codecs
import struct
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import chain, pairwise
from pathlib import Path

import numpy as np
import numpy.typing as npt

from gpt.data.prepare.foreign import NPY_MAGIC
from gpt.data.prepare.records import BadFileError
from gpt.data.shards import Tokens
from gpt.utils.helper import first_line

HEAD_BYTES = 8192
"""Bytes by which a format is recognised."""
SCAN_TOKENS = 2**20
"""Tokens that are scanned in one call."""
MAX_SEARCH_TOKENS = 2**22
"""Tokens after which the search for the start of a document gives up, and the document is cut."""

LLM_C_HEADER_BYTES = 256 * 4
LLM_C_FORMATS = {20240520: (1, "<u2"), 20240801: (7, "<u4")}
"""Magic -> (version that can be read, type of the tokens)."""
LLM_C_OTHER_FILES = {20240326: "weights", 20240327: "state", 20240328: "tokenizer", 20240522: "evaluation"}

MEGATRON_MAGIC = b"MMIDIDX\x00\x00"
MEGATRON_HEADER = struct.Struct("<9sQBQQ")
"""Magic, version, type, sequences, entries of the document index."""
MEGATRON_DTYPES = {1: "u1", 2: "i1", 3: "<i2", 4: "<i4", 5: "<i8", 8: "<u2", 9: "<u4", 10: "<u8"}
"""6 and 7 are floats; 9 and 10 are written by forks only."""

MAX_NPY_HEADER_BYTES = 10_000
"""numpy has the same limit, but reads the header before it checks."""

OTHER_BINARY_MAGIC = (b"\x1f\x8b\x08", b"\x28\xb5\x2f\xfd", b"PAR1", b"PK\x03\x04")
"""gzip, zstd, Parquet and zip (which PyTorch's weights are, often with the suffix .bin)."""


@dataclass(frozen=True, eq=False)
class TokenFile:
    """A mapped file of tokens.

    Attributes:
        path: named in messages.
        tokens: all tokens of the file.
        starts: where documents begin, ascending from 0; None if the file does not say.
    """

    path: Path
    tokens: Tokens
    starts: npt.NDArray[np.int64] | None = None

    def find_ranges(self, part_tokens: int, end_of_text: int | None) -> list[tuple[int, int]]:
        """Return consecutive ranges of about `part_tokens` that cover the file and cut no document.

        The last may be shorter. A document is cut only if no other one begins within MAX_SEARCH_TOKENS.
        """
        assert part_tokens > 0
        edges = [0]
        while edges[-1] + part_tokens < len(self.tokens):
            edges.append(self._find_next_start(edges[-1] + part_tokens, end_of_text))
        if edges[-1] < len(self.tokens):
            edges.append(len(self.tokens))
        return list(pairwise(edges))

    def documents(self, start: int, stop: int, end_of_text: int | None) -> Iterator[Tokens]:
        """Yield the documents of a range that have any token, without the end-of-text tokens around them.

        Documents begin where the file says, else at each end-of-text token.
        """
        tokens = np.asarray(self.tokens)  # slices of a memmap take longer
        inner: Iterator[int]
        if self.starts is None:
            inner = self._find_end_of_text(start, stop, end_of_text)
        else:
            inner = map(int, self.starts[np.searchsorted(self.starts, start) : np.searchsorted(self.starts, stop)])
        for first, end in pairwise(chain([start], inner, [stop])):
            while first < end and tokens[first] == end_of_text:
                first += 1
            while first < end and tokens[end - 1] == end_of_text:
                end -= 1
            if first < end:
                yield tokens[first:end]

    def check_ids(self, start: int, stop: int, vocab_size: int) -> None:
        """Check every id of a range against the vocabulary.

        Raises:
            BadFileError: an id is not in it; names the file, the offset and the id of the first one.
        """
        for block, piece in self._blocks(start, stop):
            if piece.max() < vocab_size and piece.min() >= 0:
                continue
            offset = block + int(((piece >= vocab_size) | (piece < 0)).argmax())
            raise BadFileError(
                f"{self.path}: token {self.tokens[offset]} at offset {offset} is not in the vocabulary of "
                f"{vocab_size}; set --data.tokenizer to the tokenizer that wrote the file"
            )

    def _find_next_start(self, position: int, end_of_text: int | None) -> int:
        """Return the start of the first document at or after a position; the position itself if none is found."""
        end = len(self.tokens)
        if self.starts is not None:
            following = int(np.searchsorted(self.starts, position))
            return int(self.starts[following]) if following < len(self.starts) else end
        found = next(self._find_end_of_text(position, min(position + MAX_SEARCH_TOKENS, end), end_of_text), None)
        if found is None:
            return position
        return found if found < end - 1 else end  # no document begins with the last token

    def _find_end_of_text(self, start: int, stop: int, end_of_text: int | None) -> Iterator[int]:
        if end_of_text is not None:
            for block, piece in self._blocks(start, stop):
                yield from (block + np.flatnonzero(piece == end_of_text)).tolist()

    def _blocks(self, start: int, stop: int) -> Iterator[tuple[int, Tokens]]:
        tokens = np.asarray(self.tokens)
        for block in range(start, stop, SCAN_TOKENS):
            yield block, tokens[block : min(block + SCAN_TOKENS, stop)]


def is_token_file(path: Path, head: bytes) -> bool:
    """Return whether a file that begins with `head` holds tokens.

    Raises:
        BadFileError: the index beside the file cannot be read.
    """
    return _choose_reader(path, head) is not None


def is_token_index(path: Path, head: bytes) -> bool:
    """Return whether a file is an index of Megatron's, which belongs to the .bin beside it and is no source itself."""
    return path.suffix == ".idx" and head.startswith(MEGATRON_MAGIC)


def open_tokens(path: Path) -> TokenFile:
    """Map a file of tokens.

    Raises:
        BadFileError: the file is damaged, or holds something else.
    """
    head = _read_head(path)
    if not head:
        raise BadFileError(f"{path}: the file is empty; name one with tokens in it")
    reader = _choose_reader(path, head)
    if reader is None and is_token_index(path, head):
        raise BadFileError(f"{path} is the index of a token file; name the file itself, {path.with_suffix('.bin')}")
    if reader is None:
        known = LLM_C_OTHER_FILES.get(_magic_number(head))
        found = f"the {known} of llm.c" if known else "not a file of tokens"
        raise BadFileError(f"{path}: {found}; name a .bin of nanoGPT, llm.c or Megatron, or a .npy")
    try:
        return reader(path, head)
    except OSError as error:
        raise _unreadable_error(path, error) from error


def _choose_reader(path: Path, head: bytes) -> Callable[[Path, bytes], TokenFile] | None:
    """Return the function that reads the file; None if it holds no tokens."""
    index = path.with_suffix(".idx")
    is_bin = path.suffix.lower() == ".bin"
    if is_bin and index.is_file() and _read_head(index).startswith(MEGATRON_MAGIC):
        return _read_megatron  # checked first, since its .bin may begin with any bytes
    if head.startswith(NPY_MAGIC):
        return _read_numpy
    number = _magic_number(head)
    if number in LLM_C_FORMATS:
        return _read_llm_c
    if not is_bin or number in LLM_C_OTHER_FILES or head.startswith(OTHER_BINARY_MAGIC) or not _is_binary(head):
        return None
    return _read_megatron if index.is_file() else _read_nanogpt


def _read_nanogpt(path: Path, head: bytes) -> TokenFile:
    size = path.stat().st_size
    if size % 2:
        raise BadFileError(f"{path}: {size} bytes are not a whole number of uint16 tokens; copy the file again")
    # 32-bit ids read as uint16 have almost only zeros in every second place.
    low, high = np.frombuffer(head[: len(head) // 4 * 4], "<u2").astype(int).reshape(-1, 2).T
    if len(high) >= 256 and high.max() <= 3 and low.max() > 16 * (1 + high.max()):
        index = path.with_suffix(".idx").name
        raise BadFileError(f"{path}: seems to hold 32-bit ids; copy Megatron's {index} beside it, or save it as .npy")
    return TokenFile(path, np.memmap(path, "<u2", mode="r"))


def _read_llm_c(path: Path, head: bytes) -> TokenFile:
    if len(head) < LLM_C_HEADER_BYTES:
        raise BadFileError(
            f"{path}: {len(head)} bytes are less than llm.c's header of {LLM_C_HEADER_BYTES}; copy it again"
        )
    magic, version, count = struct.unpack_from("<3i", head)
    known_version, dtype = LLM_C_FORMATS[magic]
    if version != known_version:
        raise BadFileError(f"{path}: llm.c's format {magic} in version {version}; save it in version {known_version}")
    size, expected = path.stat().st_size, LLM_C_HEADER_BYTES + count * np.dtype(dtype).itemsize
    if size != expected or not count:
        raise BadFileError(
            f"{path}: {size} bytes, but its header says {count} tokens in {expected} bytes; copy it again"
        )
    return TokenFile(path, np.memmap(path, dtype, mode="r", offset=LLM_C_HEADER_BYTES))


def _read_megatron(path: Path, head: bytes) -> TokenFile:
    index = path.with_suffix(".idx")
    header = _read_head(index)[: MEGATRON_HEADER.size]
    size, size_of_tokens = index.stat().st_size, path.stat().st_size
    if not header.startswith(MEGATRON_MAGIC):
        raise BadFileError(
            f"{index}: is beside {path.name} but is no index of Megatron's; copy it again or move it away"
        )
    if len(header) < MEGATRON_HEADER.size:
        raise BadFileError(f"{index}: {size} bytes are less than its header of {MEGATRON_HEADER.size}; copy it again")
    _, version, code, sequences, entries = MEGATRON_HEADER.unpack(header)
    if version != 1 or code not in MEGATRON_DTYPES:
        raise BadFileError(f"{index}: version {version}, type {code}; save it in version 1 as integers, type 4 or 8")
    at_pointers = MEGATRON_HEADER.size + 4 * sequences
    at_documents = at_pointers + 8 * sequences
    end = at_documents + 8 * entries
    if size not in (end, end + sequences):  # multimodal: a byte more for each sequence
        claim = f"{sequences} sequences and {entries} entries of documents in {end} bytes"
        raise BadFileError(f"{index}: {size} bytes, but its header says {claim}; copy it again")
    content, dtype = np.memmap(index, np.uint8, mode="r"), np.dtype(MEGATRON_DTYPES[code])
    lengths = content[MEGATRON_HEADER.size : at_pointers].view("<i4")
    edges = np.concatenate([np.zeros(1, np.int64), np.cumsum(lengths, dtype=np.int64)])
    if (lengths < 0).any() or int(edges[-1]) * dtype.itemsize != size_of_tokens:
        claim = f"lengths add up to {edges[-1]} tokens of {dtype.itemsize} bytes"
        raise BadFileError(f"{index}: {claim}, but {path.name} has {size_of_tokens} bytes; copy both again")
    if not np.array_equal(content[at_pointers:at_documents].view("<i8"), edges[:-1] * dtype.itemsize):
        raise BadFileError(f"{index}: pointers and lengths of the sequences disagree; copy it again")
    documents = content[at_documents:end].view("<i8")
    ascends = entries > 0 and documents[0] == 0 and (documents[:-1] <= documents[1:]).all()
    if not ascends or documents[-1] != sequences:
        raise BadFileError(
            f"{index}: the document index does not ascend from 0 to {sequences} sequences; copy it again"
        )
    starts = np.unique(edges[documents])[:-1]  # empty documents fall together; the last is the file's end
    return TokenFile(path, np.memmap(path, dtype, mode="r"), starts)


def _read_numpy(path: Path, head: bytes) -> TokenFile:
    # Version 1 has two bytes for the length of the header, the others four.
    header_size = int.from_bytes(head[8 : 10 if head[6:7] == b"\x01" else 12], "little")
    if header_size > MAX_NPY_HEADER_BYTES:
        raise BadFileError(f"{path}: damaged: a header of {header_size} bytes; copy it again")
    try:
        with warnings.catch_warnings(action="ignore"):
            tokens = np.load(path, mmap_mode="r", allow_pickle=False)
    except Exception as error:  # numpy has Python parse the header, which can raise many exceptions
        raise BadFileError(f"{path}: {first_line(error)}; save it again, as one dimension of integers") from error
    if tokens.ndim != 1 or tokens.dtype.kind not in "iu":
        raise BadFileError(f"{path}: shape {tokens.shape} of {tokens.dtype}; save it as one dimension of integers")
    size, expected = path.stat().st_size, tokens.offset + tokens.nbytes
    if size != expected or not len(tokens):
        raise BadFileError(
            f"{path}: {size} bytes, but its header says {len(tokens)} tokens in {expected} bytes; copy it again"
        )
    return TokenFile(path, tokens)


def _magic_number(head: bytes) -> int:
    return int.from_bytes(head[:4], "little")


def _is_binary(head: bytes) -> bool:
    """Return whether bytes are not UTF-8, or have a NUL; the last character may be incomplete."""
    try:
        return "\0" in codecs.getincrementaldecoder("utf-8")().decode(head)
    except UnicodeDecodeError:
        return True


def _read_head(path: Path) -> bytes:
    try:
        with path.open("rb") as file:
            return file.read(HEAD_BYTES)
    except OSError as error:
        raise _unreadable_error(path, error) from error


def _unreadable_error(path: Path, error: OSError) -> BadFileError:
    return BadFileError(f"{path}: cannot be read: {error.strerror or first_line(error)}")
