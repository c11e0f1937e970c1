"""Causal attention in bfloat16 on CPUs with AVX512_BF16, by attention_cpu.c, which the installation compiles.

hatch_build.py compiles it. Shapes: B rows, H heads, T tokens, D = head_dim.
"""

import ctypes
from functools import cache
from pathlib import Path
from typing import NamedTuple

import torch

from gpt.ops.c_library import load_library

SOURCE = Path(__file__).with_suffix(".c")
LIBRARY = SOURCE.with_name("libattention_cpu.so")
HEAD_DIM_MULTIPLE = 32
"""Number that head_dim must be a multiple of."""

_enabled = True


class Saved(NamedTuple):
    """Tensors that the forward pass saves for backward."""

    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    out: torch.Tensor
    log_sums: torch.Tensor
    """(B, H, T) float32, log2 of each query's softmax denominator."""
    doc_starts: torch.Tensor | None


class _Tensor(ctypes.Structure):
    _fields_ = (("data", ctypes.c_void_p), *((name, ctypes.c_int64) for name in ("batch", "head", "token")))


class _Attention(ctypes.Structure):
    _fields_ = (
        *((name, _Tensor) for name in ("q", "k", "v", "out", "out_grad", "q_grad", "k_grad", "v_grad")),
        *((name, ctypes.c_void_p) for name in ("log_sums", "doc_starts")),
        *((name, ctypes.c_int64) for name in ("batch", "heads", "tokens", "head_dim", "threads")),
    )


def set_enabled(enabled: bool) -> bool:
    """Enable or disable the kernel in this process; return whether it is used from now on."""
    global _enabled
    _enabled = enabled
    return is_enabled()


def is_enabled() -> bool:
    """Return whether the kernel computes what it supports; this decides the last bits of a run."""
    return _enabled and _load_library() is not None


def supports(device: torch.device, dtype: torch.dtype, head_dim: int) -> bool:
    """Return whether `forward` takes such tensors."""
    return device.type == "cpu" and dtype == torch.bfloat16 and head_dim % HEAD_DIM_MULTIPLE == 0 and is_enabled()


def forward(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, doc_starts: torch.Tensor | None) -> Saved:
    """Compute causal attention; the result is `out`, (B, H, T, D), in which the heads of a token are contiguous.

    Args:
        q: (B, H, T, D) bfloat16, of any strides.
        k: (B, H, T, D).
        v: (B, H, T, D).
        doc_starts: (B, T) int32, the first position that each position attends to, non-decreasing along a row; None: 0.
    """
    B, H, T, _ = q.shape
    assert q.shape == k.shape == v.shape and q.dtype == k.dtype == v.dtype == torch.bfloat16
    assert doc_starts is None or (doc_starts.shape == (B, T) and doc_starts.dtype == torch.int32)
    q, k, v = (_make_rows_dense(x) for x in (q, k, v))
    log_sums = torch.empty(B, H, T, dtype=torch.float32, device=q.device)
    saved = Saved(q, k, v, _empty_like(q), log_sums, doc_starts)
    _call("attention_forward", saved)
    return saved


def backward(saved: Saved, out_grad: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return the gradients of q, k and v, each (B, H, T, D), from that of `out`."""
    grads = _empty_like(saved.q), _empty_like(saved.q), _empty_like(saved.q)
    _call("attention_backward", saved, _make_rows_dense(out_grad), *grads)
    return grads


def _call(function: str, saved: Saved, *grads: torch.Tensor) -> None:
    q, k, v, out, log_sums, doc_starts = saved
    B, H, T, D = q.shape
    tensors = [_Tensor(x.data_ptr(), *x.stride()[:3]) for x in (q, k, v, out, *grads)]
    tensors += [_Tensor()] * (8 - len(tensors))
    doc_starts = None if doc_starts is None else doc_starts.contiguous()
    address = None if doc_starts is None else doc_starts.data_ptr()
    call = _Attention(*tensors, log_sums.data_ptr(), address, B, H, T, D, torch.get_num_threads())
    if not getattr(_load_library(), function)(ctypes.byref(call)):
        raise MemoryError(f"{function}: out of memory for the scratch of {torch.get_num_threads()} threads")


def _make_rows_dense(x: torch.Tensor) -> torch.Tensor:
    return x if x.stride(3) == 1 else x.contiguous()


def _empty_like(x: torch.Tensor) -> torch.Tensor:
    B, H, T, D = x.shape
    return x.new_empty(B, T, H, D).transpose(1, 2)


@cache
def _load_library() -> ctypes.CDLL | None:
    return load_library(SOURCE, LIBRARY, "attention")
