"""Safetensors files of tensors, written and hashed in one pass; the library reads them.

`safetensors.torch.save_file` copies every tensor to `bytes`, and its file would have to be read again for the digest.
The bytes written here are the library's own, because the tensors are in its order.
"""

import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from gpt.errors import UserError
from gpt.utils.helper import first_line
from gpt.utils.safetensors_file import TensorEntry, encode_header, read_header

CHUNK_BYTES = 2**23
"""Bytes written and hashed at a time; hashing a long chunk releases the interpreter to other threads."""
MAX_HEADER_BYTES = 100_000_000
"""Limit of the safetensors library."""

# The library's names in its order: dtypes with the strictest alignment come first.
_DTYPES = {
    torch.uint64: "U64",
    torch.int64: "I64",
    torch.float64: "F64",
    torch.float32: "F32",
    torch.uint32: "U32",
    torch.int32: "I32",
    torch.bfloat16: "BF16",
    torch.float16: "F16",
    torch.uint16: "U16",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
_DTYPE_ORDER = {dtype: place for place, dtype in enumerate(_DTYPES)}


@dataclass(frozen=True)
class FileRecord:
    """Size and digest of a file, as recorded in a manifest."""

    size: int
    """Bytes."""
    sha256: str


def write_tensors(
    path: Path, tensors: Mapping[str, torch.Tensor], metadata: dict[str, str] | None = None
) -> FileRecord:
    """Write contiguous tensors in host memory to a new file, with free-form strings in its header.

    Raises:
        OSError: the disk refused; the error names the file.
    """
    names = sorted(tensors, key=lambda name: (_DTYPE_ORDER[tensors[name].dtype], name))
    entries = [
        TensorEntry(name, _DTYPES[tensors[name].dtype], list(tensors[name].shape), tensors[name].nbytes)
        for name in names
    ]
    header = encode_header(entries, metadata)
    return write_bytes(path, [header, *(_view_bytes(tensors[name]) for name in names)])


def write_bytes(path: Path, parts: Iterable[bytes | memoryview]) -> FileRecord:
    """Write a new file and hash it at the same time.

    Raises:
        OSError: the disk refused; the error names the file.
    """
    digest, size = hashlib.sha256(), 0
    try:
        with path.open("xb", buffering=CHUNK_BYTES // 8) as file:
            for part in parts:
                for start in range(0, len(part), CHUNK_BYTES):
                    chunk = part[start : start + CHUNK_BYTES]
                    file.write(chunk)
                    digest.update(chunk)
                    size += len(chunk)
    except OSError as error:  # a failed write does not name its file
        raise OSError(error.errno, error.strerror, str(path)) from error
    return FileRecord(size, digest.hexdigest())


def read_tensors(path: Path) -> dict[str, torch.Tensor]:
    """Load the tensors of a file, which should be verified before.

    Raises:
        UserError: it is not a valid safetensors file.
    """
    try:
        _require_unique_names(path)
        tensors: dict[str, torch.Tensor] = load_file(path)
    except (OSError, ValueError, KeyError, RecursionError, MemoryError, SafetensorError) as error:
        raise UserError(f"{path}: not a valid safetensors file: {first_line(error)}") from error
    return tensors


def _view_bytes(tensor: torch.Tensor) -> memoryview:
    """Return a view of the tensor's memory."""
    assert tensor.is_contiguous() and tensor.device.type == "cpu"
    return tensor.detach().reshape(-1).view(torch.uint8).numpy().data


def _require_unique_names(path: Path) -> None:
    """Refuse a header with a repeated name, where the library would silently take the last one.

    Raises:
        ValueError: a name occurs twice, or the header is not valid JSON.
    """

    def require_unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        if len(dict(pairs)) < len(pairs):
            raise ValueError("a name occurs twice in its header")
        return dict(pairs)

    with path.open("rb") as file:
        json.loads(read_header(file, MAX_HEADER_BYTES), object_pairs_hook=require_unique)
