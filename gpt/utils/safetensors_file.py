"""The header of a safetensors file, which says where in the file each tensor lies.

The format (github.com/huggingface/safetensors, README): 8 bytes, little-endian, with the header's length; the header as
JSON, padded with spaces to a multiple of 8 bytes; the tensors' bytes.
"""

import json
from collections.abc import Iterable
from typing import Any, BinaryIO, NamedTuple

LENGTH_BYTES = 8
"""Bytes before the header, which hold its length."""


class TensorEntry(NamedTuple):
    """A tensor in the header."""

    name: str
    dtype: str
    """The format's name for it, such as F32."""
    shape: list[int]
    nbytes: int


def encode_header(
    tensors: Iterable[TensorEntry], metadata: dict[str, str] | None = None, *, compact: bool = True
) -> bytes:
    """Return everything before the tensors' bytes.

    Args:
        tensors: in the order of their bytes.
        metadata: free-form strings.
        compact: whether to write the JSON as the safetensors library does: no spaces, non-ASCII characters as they are.
            Token files keep the spaces that they have always had, because their digests depend on them.
    """
    header: dict[str, Any] = {} if metadata is None else {"__metadata__": metadata}
    start = 0
    for name, dtype, shape, nbytes in tensors:
        stop = start + nbytes
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [start, stop]}
        start = stop
    text = (json.dumps(header, ensure_ascii=False, separators=(",", ":")) if compact else json.dumps(header)).encode()
    text += b" " * (-len(text) % 8)  # aligns the tensors
    return len(text).to_bytes(LENGTH_BYTES, "little") + text


def read_header(file: BinaryIO, max_bytes: int) -> bytes:
    """Read the header's JSON text from the start of a file; shorter than announced if the file ends within it.

    Raises:
        ValueError: the header is longer than `max_bytes`.
    """
    length = int.from_bytes(file.read(LENGTH_BYTES), "little")
    if length > max_bytes:
        raise ValueError(f"its header of {length} bytes is longer than {max_bytes} bytes")
    return file.read(length)
