"""Linear layers for a few rows in bfloat16 on CPUs with AVX512_BF16, by linear_cpu.c, which the installation compiles.

For generation, which reads every weight for one token of each text. torch's matmul reads them at less than half the
speed. Huge pages double it once more: a CPU that reads 250 MB in pages of 4 KiB waits for page tables most of the time.
"""

import ctypes
import mmap
from collections.abc import Sequence
from functools import cache
from pathlib import Path

import torch

from gpt.ops.c_library import load_library

SOURCE = Path(__file__).with_suffix(".c")
LIBRARY = SOURCE.with_name("liblinear_cpu.so")
MAX_ROWS = 8
"""Rows up to which the kernel is faster than torch's matmul, which has AMX (docs/EXPERIMENTS.md)."""
HUGE_PAGE_BYTES = 2**21
ALIGNMENT_BYTES = 64
"""Bytes of a cache line and of a register."""


class _Linear(ctypes.Structure):
    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("x", "weight", "bias", "out")),
        *((name, ctypes.c_int64) for name in ("rows", "n_in", "n_out", "threads")),
    )


def supports(x: torch.Tensor) -> bool:
    """Return whether `forward` takes such an input and is faster than torch's matmul."""
    return x.device.type == "cpu" and x.numel() <= MAX_ROWS * x.shape[-1] and _load_library() is not None


def forward(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """Return x @ weight.T + bias, (..., C) bfloat16.

    Args:
        x: (..., A) of any floating-point dtype, rounded to bfloat16.
        weight: (C, A) bfloat16, contiguous.
        bias: (C,) float32.
    """
    n_out, n_in = weight.shape
    x = x.to(torch.bfloat16).contiguous()
    out = x.new_empty(*x.shape[:-1], n_out)
    library = _load_library()
    assert library is not None and weight.dtype == torch.bfloat16 and weight.is_contiguous()
    address = None if bias is None else bias.data_ptr()
    rows, threads = x.numel() // n_in, torch.get_num_threads()
    call = _Linear(x.data_ptr(), weight.data_ptr(), address, out.data_ptr(), rows, n_in, n_out, threads)
    library.linear_forward(ctypes.byref(call))
    return out


def copy_to_huge_pages(tensors: Sequence[torch.Tensor], dtype: torch.dtype) -> list[torch.Tensor]:
    """Return copies of tensors in one block of the CPU's memory, in huge pages where Linux grants them.

    Args:
        tensors: the tensors.
        dtype: dtype of the copies.
    """
    sizes = [tensor.numel() * dtype.itemsize for tensor in tensors]
    places = [-(-size // ALIGNMENT_BYTES) * ALIGNMENT_BYTES for size in sizes]
    n_bytes = sum(places) + HUGE_PAGE_BYTES
    if hasattr(mmap, "MADV_HUGEPAGE"):  # Linux
        block = mmap.mmap(-1, n_bytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)  # shared memory gets none
        block.madvise(mmap.MADV_HUGEPAGE)
        memory = torch.frombuffer(block, dtype=torch.uint8)  # keeps the block alive
    else:
        memory = torch.empty(n_bytes, dtype=torch.uint8)
    start = -memory.data_ptr() % HUGE_PAGE_BYTES
    copies = []
    for tensor, size, place in zip(tensors, sizes, places, strict=True):
        copy = memory[start : start + size].view(dtype).view(tensor.shape)
        copies.append(copy.copy_(tensor))
        start += place
    return copies


@cache
def _load_library() -> ctypes.CDLL | None:
    return load_library(SOURCE, LIBRARY, "linear")
