"""Attention of bfloat16 on a CPU with AVX512_BF16, by attention.c, which the installation compiles (hatch_build.py).

Shapes: B rows, H heads, T tokens, D = width of a head.
"""

import ctypes
import hashlib
from functools import cache
from pathlib import Path
from typing import NamedTuple

import torch

SOURCE = Path(__file__).with_suffix(".c")
LIBRARY = SOURCE.with_name("libattention_cpu.so")
WIDTHS = 32
"""What the width of a head must be a multiple of."""

_switched_on = True


class Saved(NamedTuple):
    """What a backward pass needs of the forward pass."""

    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    out: torch.Tensor
    log_sums: torch.Tensor
    """(B, H, T) float32, for each query the logarithm, to base 2, of the sum of its weights before they are divided."""
    begins: torch.Tensor | None


class _Tensor(ctypes.Structure):
    _fields_ = (("data", ctypes.c_void_p), *((name, ctypes.c_int64) for name in ("batch", "head", "token")))


class _Attention(ctypes.Structure):
    _fields_ = (
        *((name, _Tensor) for name in ("q", "k", "v", "out", "out_grad", "q_grad", "k_grad", "v_grad")),
        *((name, ctypes.c_void_p) for name in ("log_sums", "begins")),
        *((name, ctypes.c_int64) for name in ("batch", "heads", "tokens", "width", "threads")),
    )


def switch(on: bool) -> bool:
    """Let attention be computed here, or not, in this process; whether it is from now on."""
    global _switched_on
    _switched_on = on
    return in_use()


def in_use() -> bool:
    """Whether attention is computed here where it can be; it decides the last bits of a run."""
    return _switched_on and _library() is not None


def serves(device: torch.device, dtype: torch.dtype, head_dim: int) -> bool:
    """Whether `forward` takes such tensors."""
    return device.type == "cpu" and dtype == torch.bfloat16 and head_dim % WIDTHS == 0 and in_use()


def forward(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, begins: torch.Tensor | None) -> Saved:
    """Causal attention; its result is `out` of what it returns, (B, H, T, D) with the heads of a token side by side.

    Args:
        q: (B, H, T, D) bfloat16, of any strides.
        k: (B, H, T, D).
        v: (B, H, T, D).
        begins: (B, T) int32, the first position that each one sees, which does not decrease along a row; None: 0.
    """
    B, H, T, _ = q.shape
    assert q.shape == k.shape == v.shape and q.dtype == k.dtype == v.dtype == torch.bfloat16
    assert begins is None or (begins.shape == (B, T) and begins.dtype == torch.int32)
    q, k, v = (_with_dense_rows(x) for x in (q, k, v))
    log_sums = torch.empty(B, H, T, dtype=torch.float32, device=q.device)
    saved = Saved(q, k, v, _empty_like(q), log_sums, begins)
    _call("attention_forward", saved)
    return saved


def backward(saved: Saved, out_grad: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gradients of q, k and v, of their shapes, from that of `out`."""
    grads = _empty_like(saved.q), _empty_like(saved.q), _empty_like(saved.q)
    _call("attention_backward", saved, _with_dense_rows(out_grad), *grads)
    return grads


def _call(function: str, saved: Saved, *grads: torch.Tensor) -> None:
    q, k, v, out, log_sums, begins = saved
    B, H, T, D = q.shape
    tensors = [_Tensor(x.data_ptr(), *x.stride()[:3]) for x in (q, k, v, out, *grads)]
    tensors += [_Tensor()] * (8 - len(tensors))
    begins = None if begins is None else begins.contiguous()
    address = None if begins is None else begins.data_ptr()
    call = _Attention(*tensors, log_sums.data_ptr(), address, B, H, T, D, torch.get_num_threads())
    if not getattr(_library(), function)(ctypes.byref(call)):
        raise MemoryError(f"{function}: no memory for {torch.get_num_threads()} threads")


def _with_dense_rows(x: torch.Tensor) -> torch.Tensor:
    return x if x.stride(3) == 1 else x.contiguous()


def _empty_like(x: torch.Tensor) -> torch.Tensor:
    B, H, T, D = x.shape
    return x.new_empty(B, T, H, D).transpose(1, 2)


@cache
def _library() -> ctypes.CDLL | None:
    """What was compiled; None where nothing was, where it is of another source, or where this CPU cannot run it."""
    try:
        ctypes.CDLL(_openmp_runtime(), ctypes.RTLD_GLOBAL)
        library = ctypes.CDLL(str(LIBRARY))
        library.attention_source.restype = ctypes.c_char_p
        fits = library.attention_source().decode() == hashlib.sha256(SOURCE.read_bytes()).hexdigest()
    except (OSError, AttributeError):
        return None
    return library if fits and library.attention_runs_here() else None


def _openmp_runtime() -> str | None:
    """The one that manages torch's threads: under a second one beside it twice as many would wait for the cores."""
    maps = Path("/proc/self/maps").read_text(encoding="utf-8", errors="surrogateescape")
    mapped = {Path(name) for line in maps.splitlines() for name in line.split(maxsplit=5)[5:]}
    runtimes = [path for path in mapped if path.name.startswith(("libgomp", "libiomp5"))]
    # torch's lies in its folder, or beside that.
    ranked = sorted(runtimes, key=lambda path: ({"torch", "torch.libs"}.isdisjoint(path.parts), str(path)))
    return str(ranked[0]) if ranked else None
