"""Causal attention, over whole rows or inside each document of a row.

Shapes: B rows, H heads, T tokens, D = head_dim. `documents` is (B, T) int64: the number of each position's document,
non-decreasing along the row; padding at a row's end has a number of its own.
"""

import logging
import math
from collections.abc import Callable, Sequence
from functools import cache
from importlib.util import find_spec
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch.autograd.function import once_differentiable
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, flex_attention

from gpt.ops import attention_cpu as kernel
from gpt.ops.precision import autocast_off, compute_dtype, to_compute_dtype
from gpt.utils.helper import first_line

log = logging.getLogger(__name__)

HAS_TRITON = find_spec("triton") is not None
"""FlexAttention's kernels can be compiled; torch for Windows comes without Triton."""
MATMUL_DTYPES = frozenset({torch.bfloat16})
"""Dtypes in which matmuls of our own beat SDPA on a CPU; float32 does not (docs/EXPERIMENTS.md). The kernel of
`gpt.ops.attention_cpu`, where it is supported, is 2.5x as fast as they are."""
QUERY_BLOCK = 256
"""Queries of a row whose scores are computed at a time; the keys after the block are skipped."""
SAVE_WEIGHTS_MAX_LEN = 512
"""Tokens of a row up to which attention weights are saved for backward. In longer rows they would be most of what a
model saves, and are recomputed."""
FLEX_MIN_HEAD_DIM = 16
"""Narrowest head that Triton's matmul takes (torch/_inductor/kernel/flex/flex_attention.py)."""
FLEX_TRIAL_TOKENS = 128
"""Length of the row that tries whether FlexAttention works: one block of its mask."""
HALF_DTYPES = frozenset({torch.bfloat16, torch.float16})


class DocumentMask:
    """Attention mask of rows that hold several documents, or of a sliding window; built once per forward pass.

    On CUDA it holds FlexAttention's block mask (Dong et al. 2024, "Flex Attention"), which skips blocks that are masked
    completely; no layer holds a T x T tensor. The same is true of `gpt.ops.attention_cpu`, for which it holds the start
    of what each position attends to. Elsewhere, and where neither is supported, it holds a boolean for each pair of
    positions. With all three, documents are isolated bit-exactly: a masked position has the weight exp(-inf) = 0, and
    adding 0 times a finite number changes no sum, forward or backward.

    On a CPU the booleans are not always the fastest exact form: one call per document takes half the time in rows of
    1024 tokens and twice the time in rows of 128. But it needs the lengths on the host, and torch.compile would compile
    again for each layout.

    Args:
        documents: (B, T) int64.
        dropout: probability that a layer drops an attention weight in this pass.
        head_dim: D.
        dtype: dtype of queries, keys and values.
        window: number of tokens that each token attends to, itself included (Beltagy et al. 2020, "Longformer",
            section 3.1); 0: its document's past.
    """

    def __init__(self, documents: torch.Tensor, *, dropout: float, head_dim: int, dtype: torch.dtype, window: int = 0):
        window = window or documents.shape[1]
        self.blocks: BlockMask | None = None
        self.doc_starts: torch.Tensor | None = None  # (B, T) int32, the first position that each position attends to
        self.allowed: torch.Tensor | None = None  # (B, 1, T, T) bool, the same for every head
        self.masked: torch.Tensor | None = None  # ~allowed
        if supports_flex(documents.device, dtype, dropout=dropout, head_dim=head_dim):
            self.blocks = _build_block_mask(documents, window)
        elif _supports_kernel(documents.device, dtype, dropout=dropout, head_dim=head_dim):
            index = torch.arange(documents.shape[1], device=documents.device)  # (T,)
            self.doc_starts = (index - positions_in_documents(documents).clamp(max=window - 1)).int()
        else:
            self.allowed = (documents[:, None, :, None] == documents[:, None, None, :]).tril()
            if window < documents.shape[1]:
                self.allowed = self.allowed.triu(1 - window)
            self.masked = ~self.allowed


Attend = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, DocumentMask | None], torch.Tensor]
"""Attention of new tokens to a cache and to themselves: their queries (B, H, T, D), keys (B, K, T, D) and values
(B, K, T, D), which it adds to the cache, and the mask of a text's first tokens -> (B, H, T, D)."""


class Cache(Protocol):
    """Keys and values of the tokens before those of a forward pass: `gpt.inference.kv_cache` holds them."""

    positions: torch.Tensor
    """(B, T) int64, the positions of the new tokens."""
    layers: Sequence[Attend]
    """Attention of each block."""

    def select_last(self, x: torch.Tensor) -> torch.Tensor:
        """Return each row's last token, (B, T, C) -> (B, C): rows may end with padding."""


def attend(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: DocumentMask | None, *, dropout: float
) -> torch.Tensor:
    """Return causal attention, by the fastest implementation for these tensors.

    Args:
        q: (B, H, T, D), queries.
        k: (B, K, T, D), keys; heads of a group of H / K share them (Ainslie et al. 2023, "GQA").
        v: (B, K, T, D), values.
        mask: document mask, built for these rows, this head_dim and this dropout; None: each row is one document.
        dropout: probability that an attention weight is dropped.

    Returns:
        (B, H, T, D).
    """
    out: torch.Tensor
    shares_heads = k.shape[1] < q.shape[1] and _supports_shared_heads(q, mask)
    if not shares_heads:
        k, v = (repeat_heads(x, q.shape[1] // x.shape[1]) for x in (k, v))
    q, k, v = to_compute_dtype(q, k, v)
    if mask is None:
        uses_kernel = _supports_kernel(q.device, q.dtype, dropout=dropout, head_dim=q.shape[3])
    else:
        uses_kernel = mask.doc_starts is not None
    if uses_kernel:
        out = _KernelAttention.apply(q, k, v, mask and mask.doc_starts)  # type: ignore[no-untyped-call]
        return out
    if dropout == 0 and q.device.type == "cpu" and q.dtype in MATMUL_DTYPES:
        out = _MatmulAttention.apply(q, k, v, mask and mask.masked)  # type: ignore[no-untyped-call]
        return out
    if mask is None:
        return F.scaled_dot_product_attention(q, k, v, dropout_p=dropout, is_causal=True, enable_gqa=shares_heads)
    if mask.blocks is None:
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask.allowed, dropout_p=dropout)
    out = _compile_if_eager(flex_attention)(q, k, v, block_mask=mask.blocks, enable_gqa=shares_heads)
    return out


def repeat_heads(x: torch.Tensor, group_size: int) -> torch.Tensor:
    """Repeat keys or values for the heads of a group, which share them (Ainslie et al. 2023, "GQA").

    (B, K, T, D) -> (B, K * group_size, T, D).
    """
    return x.repeat_interleave(group_size, dim=1) if group_size > 1 else x


class _KernelAttention(torch.autograd.Function):
    """Attention by the C kernel of `gpt.ops.attention_cpu`; backward recomputes the attention weights."""

    @staticmethod
    def forward(
        ctx: Any, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, doc_starts: torch.Tensor | None
    ) -> torch.Tensor:
        saved = kernel.forward(q, k, v, doc_starts)
        ctx.save_for_backward(*saved)
        return saved.out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> Any:
        return *kernel.backward(kernel.Saved(*ctx.saved_tensors), grad), None


class _MatmulAttention(torch.autograd.Function):
    """Attention as matmuls, for a block of queries and the keys up to its last query at a time.

    Scores and weights are rounded to the inputs' dtype and summed in float32, as in transformers' eager attention.
    Shapes: N = B * H, R queries of a block, S keys up to the last of them.
    """

    @staticmethod
    def forward(
        ctx: Any, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, masked: torch.Tensor | None
    ) -> torch.Tensor:
        B, H, T, D = q.shape
        q, k, v = (x.reshape(B * H, T, D) for x in (q, k, v))
        out, saved_weights = torch.empty_like(q), []
        for rows in _query_blocks(T):
            weights = _compute_weights(q, k, rows, masked)  # (N, R, S)
            torch.bmm(weights, v[:, : rows.stop], out=out[:, rows])
            if T <= SAVE_WEIGHTS_MAX_LEN:
                saved_weights.append(weights)
        ctx.save_for_backward(q, k, v, masked, *saved_weights)
        return out.view(B, H, T, D)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> Any:
        q, k, v, masked, *saved_weights = ctx.saved_tensors
        B, H, T, D = grad.shape
        grad = grad.reshape(B * H, T, D)
        q_grads, blocks = [], _query_blocks(T)
        k_grad: torch.Tensor | None = None
        v_grad: torch.Tensor | None = None
        for index, rows in reversed([*enumerate(blocks)]):  # the last one attends to every key
            weights = saved_weights[index] if saved_weights else _compute_weights(q, k, rows, masked)  # (N, R, S)
            weight_grad = torch.bmm(grad[:, rows], v[:, : rows.stop].transpose(1, 2))
            score_grad = torch._softmax_backward_data(weight_grad, weights, -1, weights.dtype)
            q_grads.append(_scaled_bmm(score_grad, k[:, : rows.stop], D**-0.5))  # (N, R, D)
            k_grad = _accumulate(k_grad, _scaled_bmm(score_grad.transpose(1, 2), q[:, rows], D**-0.5), len(blocks))
            v_grad = _accumulate(v_grad, torch.bmm(weights.transpose(1, 2), grad[:, rows]), len(blocks))
        q_grad = q_grads[0] if len(blocks) == 1 else torch.cat(q_grads[::-1], 1)
        return *(x.to(q.dtype).view(B, H, T, D) for x in (q_grad, k_grad, v_grad) if x is not None), None


def _accumulate(total: torch.Tensor | None, part: torch.Tensor, n_parts: int) -> torch.Tensor:
    """Add `part`, (N, S, D), to the first S keys of `total`, (N, T, D), in place; several are summed in float32."""
    if total is None:
        return part if n_parts == 1 else part.float()
    total[:, : part.shape[1]] += part
    return total


def _query_blocks(length: int) -> list[slice]:
    """Return the blocks of queries that are computed together."""
    return [slice(start, min(start + QUERY_BLOCK, length)) for start in range(0, length, QUERY_BLOCK)]


def _compute_weights(q: torch.Tensor, k: torch.Tensor, rows: slice, masked: torch.Tensor | None) -> torch.Tensor:
    """Return the attention weights of the queries `rows` on each key up to the last of them, (N, R, S).

    Args:
        q: (N, T, D).
        k: (N, T, D).
        rows: block of queries.
        masked: (B, 1, T, T) bool, pairs of query and key that are masked; None: keys after the query.
    """
    scores = _scaled_bmm(q[:, rows], k[:, : rows.stop].transpose(1, 2), q.shape[2] ** -0.5)
    if masked is None:
        n = rows.stop - rows.start
        scores[:, :, rows] += torch.full((n, n), -math.inf, dtype=scores.dtype, device=scores.device).triu(1)
    else:
        scores.view(masked.shape[0], -1, *scores.shape[1:]).masked_fill_(masked[:, :, rows, : rows.stop], -math.inf)
    return torch.softmax(scores, -1)


def _scaled_bmm(a: torch.Tensor, b: torch.Tensor, scale: float) -> torch.Tensor:
    """Return scale * (a @ b), scaled before it is rounded."""
    return torch.baddbmm(a.new_empty(1, 1, 1), a, b, beta=0, alpha=scale)


def positions_in_documents(documents: torch.Tensor) -> torch.Tensor:
    """Return each position counted from the first of its document in the row, (B, T) -> (B, T) int64; no host sync."""
    index = torch.arange(documents.shape[1], device=documents.device)  # (T,)
    is_start = documents.diff(dim=1, prepend=documents[:, :1]) != 0  # (B, T); False at 0, where the index is 0 anyway
    return index - torch.where(is_start, index, 0).cummax(dim=1).values


def _supports_kernel(device: torch.device, dtype: torch.dtype, *, dropout: float, head_dim: int) -> bool:
    return dropout == 0 and kernel.supports(device, dtype, head_dim)


def _supports_shared_heads(q: torch.Tensor, mask: DocumentMask | None) -> bool:
    # Of SDPA's implementations, FlashAttention shares heads; the one in plain operations, which holds all scores, would
    # be taken where it does not work. FlexAttention always does.
    if mask is not None:
        return mask.blocks is not None
    return _is_ampere(q.device) and compute_dtype(q) in HALF_DTYPES


def supports_flex(device: torch.device, dtype: torch.dtype, *, dropout: float, head_dim: int) -> bool:
    """Return whether document masks use FlexAttention; tries it once, and warns where it does not compile."""
    # FlexAttention has no dropout, and no backward pass on a CPU or on MPS. Its kernels do not say if they are
    # deterministic; those of SDPA do. In float32, and on GPUs before Ampere, its tiles may not fit.
    is_usable = _is_ampere(device) and HAS_TRITON and not torch.are_deterministic_algorithms_enabled()
    fits = dropout == 0 and head_dim >= FLEX_MIN_HEAD_DIM and dtype in HALF_DTYPES
    return is_usable and fits and (torch.compiler.is_compiling() or _flex_works(device, dtype, head_dim))


def _is_ampere(device: torch.device) -> bool:
    """Return whether a device is an NVIDIA GPU of compute capability 8.0 or later."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device) >= (8, 0)


# A compiler calls it instead of tracing it; see `gpt.ops.attention_cpu.is_enabled`.
_is_ampere._dynamo_marked_constant = True  # type: ignore[attr-defined]


@cache
def _flex_works(device: torch.device, dtype: torch.dtype, head_dim: int) -> bool:
    """Compile FlexAttention forward and backward for a short row; warn and return False where that fails."""
    try:
        # Generation may be the first to ask, in inference mode, where nothing has gradients.
        with torch.inference_mode(mode=False), torch.enable_grad(), autocast_off(device):
            documents = torch.zeros((1, FLEX_TRIAL_TOKENS), dtype=torch.int64, device=device)
            q = torch.zeros((1, 1, FLEX_TRIAL_TOKENS, head_dim), dtype=dtype, device=device, requires_grad=True)
            blocks = _build_block_mask(documents, FLEX_TRIAL_TOKENS)
            _compile(flex_attention)(q, q, q, block_mask=blocks).sum().backward()
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # the compiler raises many
        log.warning("FlexAttention does not work here (%s); document masks hold T x T booleans", first_line(error))
        return False
    return True


def _build_block_mask(documents: torch.Tensor, window: int) -> BlockMask:
    B, T = documents.shape

    def is_allowed(b: torch.Tensor, h: torch.Tensor, q: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
        allowed = (q >= k) & (documents[b, q] == documents[b, k])
        return allowed & (q - k < window) if window < T else allowed

    blocks: BlockMask = _compile_if_eager(create_block_mask)(is_allowed, B, None, T, T, device=documents.device)
    return blocks


def _compile_if_eager(function: Callable[..., Any]) -> Callable[..., Any]:
    # Uncompiled, FlexAttention holds all T x T scores. While the model itself is being compiled, the function is traced
    # into the model's graph as it is.
    return function if torch.compiler.is_compiling() else _compile(function)


@cache
def _compile(function: Callable[..., Any]) -> Callable[..., Any]:
    return torch.compile(function)
