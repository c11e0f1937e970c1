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


# What torch.compiler.assume_constant_result does, which would import the compiler: that takes a second.
is_enabled._dynamo_marked_constant = True  # type: ignore[attr-defined]


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
    B, _, T, _ = q.shape
    assert q.shape == k.shape == v.shape and q.dtype == k.dtype == v.dtype == torch.bfloat16
    assert doc_starts is None or (doc_starts.shape == (B, T) and doc_starts.dtype == torch.int32)
    q, k, v = (_make_rows_dense(x) for x in (q, k, v))
    out, log_sums = FORWARD_OP(q, k, v, doc_starts)
    return Saved(q, k, v, out, log_sums, doc_starts)


def backward(saved: Saved, out_grad: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return the gradients of q, k and v, each (B, H, T, D), from that of `out`."""
    grads: tuple[torch.Tensor, torch.Tensor, torch.Tensor] = BACKWARD_OP(*saved, _make_rows_dense(out_grad))
    return grads


def _run_forward(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, doc_starts: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor]:
    out, log_sums = _allocate_outputs(q, k, v, doc_starts)
    _call("attention_forward", Saved(q, k, v, out, log_sums, doc_starts))
    return out, log_sums


def _allocate_outputs(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, doc_starts: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor]:
    return _empty_like(q), q.new_empty(q.shape[:3], dtype=torch.float32)


def _run_backward(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    out: torch.Tensor,
    log_sums: torch.Tensor,
    doc_starts: torch.Tensor | None,
    out_grad: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    grads = _allocate_gradients(q)
    _call("attention_backward", Saved(q, k, v, out, log_sums, doc_starts), out_grad, *grads)
    return grads


def _allocate_gradients(
    q: torch.Tensor, *others: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    return _empty_like(q), _empty_like(q), _empty_like(q)


# Ops of torch's own kind, which a compiler calls without looking inside. torch.library.custom_op would import the
# compiler in every process.
_library = torch.library.Library("gpt", "DEF")
_library.define("attention_cpu_forward(Tensor q, Tensor k, Tensor v, Tensor? doc_starts) -> (Tensor, Tensor)")
_library.impl("attention_cpu_forward", _run_forward, "CPU")
torch.library.register_fake("gpt::attention_cpu_forward", _allocate_outputs, lib=_library)
_library.define(
    "attention_cpu_backward(Tensor q, Tensor k, Tensor v, Tensor out, Tensor log_sums, Tensor? doc_starts, "
    "Tensor out_grad) -> (Tensor, Tensor, Tensor)"
)
_library.impl("attention_cpu_backward", _run_backward, "CPU")
torch.library.register_fake("gpt::attention_cpu_backward", _allocate_gradients, lib=_library)
FORWARD_OP, BACKWARD_OP = torch.ops.gpt.attention_cpu_forward.default, torch.ops.gpt.attention_cpu_backward.default


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
