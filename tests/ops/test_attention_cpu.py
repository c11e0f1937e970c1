import hashlib
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from gpt.ops import attention_cpu

DOC_STARTS = [0, 1, 1, 1, 4, 5, 5, 7]
"""First position that each eighth of a row attends to, in eighths of the row."""

needs_kernel = pytest.mark.skipif(
    not attention_cpu.is_enabled(), reason="no compiler at installation, or no AVX512_BF16"
)


@pytest.fixture
def one_and_two_threads() -> Iterator[tuple[int, int]]:
    before = torch.get_num_threads()
    yield 1, 2
    torch.set_num_threads(before)


def random(*shape: int, seed: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).bfloat16()


def make_qkv(length: int, width: int) -> list[torch.Tensor]:
    """Return q, k and v of two rows and three heads, as views of one tensor, like a model's."""
    parts = random(2, length, 9 * width, seed=0).split(3 * width, dim=2)
    return [part.view(2, length, 3, width).transpose(1, 2) for part in parts]


def make_doc_starts(length: int) -> torch.Tensor:
    """Return (2, T) int32: a row of several documents and a row of one."""
    eighth = torch.arange(length) * 8 // length
    starts = torch.tensor([start * length // 8 for start in DOC_STARTS])
    return torch.stack([starts[eighth].clamp(max=torch.arange(length)), torch.zeros(length)]).int()


def run_kernel(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, doc_starts: torch.Tensor | None = None
) -> list[torch.Tensor]:
    """Return the kernel's output and the gradients of q, k and v."""
    saved = attention_cpu.forward(q, k, v, doc_starts)
    return [saved.out, *attention_cpu.backward(saved, random(*q.shape, seed=1))]


def run_sdpa(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, doc_starts: torch.Tensor | None = None
) -> list[torch.Tensor]:
    """Return the same from torch's SDPA in float32."""
    inputs = [x.float().detach().requires_grad_() for x in (q, k, v)]
    position = torch.arange(q.shape[2])
    allowed = (position <= position[:, None]).expand(len(q), 1, -1, -1)
    if doc_starts is not None:
        allowed = allowed & (position >= doc_starts[:, None, :, None])
    out = F.scaled_dot_product_attention(*inputs, attn_mask=allowed)
    return [out, *torch.autograd.grad(out, inputs, random(*q.shape, seed=1).float())]


@needs_kernel
@pytest.mark.parametrize("with_documents", [False, True])
@pytest.mark.parametrize("width", [32, 64, 96, 128])
@pytest.mark.parametrize("length", [1, 7, 64, 65, 127, 129, 400])
def test_kernel_matches_float32_sdpa(length: int, width: int, with_documents: bool) -> None:
    doc_starts = make_doc_starts(length) if with_documents else None
    tensors = make_qkv(length, width)
    for found, wanted in zip(run_kernel(*tensors, doc_starts), run_sdpa(*tensors, doc_starts), strict=True):
        assert found.dtype == torch.bfloat16
        assert found.shape == wanted.shape
        # bfloat16 has a relative rounding error of at most 2^-9; here two factors are rounded.
        assert (found.float() - wanted).norm() <= 0.004 * wanted.norm() + 1e-5


@needs_kernel
def test_large_scores_do_not_overflow() -> None:
    q, k, v = make_qkv(200, 64)
    for found, wanted in zip(run_kernel(50 * q, k, v), run_sdpa(50 * q, k, v), strict=True):
        assert (found.float() - wanted).norm() <= 0.02 * wanted.norm()


@needs_kernel
def test_number_of_threads_changes_no_bit(one_and_two_threads: tuple[int, int]) -> None:
    found = []
    for threads in one_and_two_threads:
        torch.set_num_threads(threads)
        found.append(run_kernel(*make_qkv(300, 64), make_doc_starts(300)))
    assert all(torch.equal(one, two) for one, two in zip(*found, strict=True))


@needs_kernel
def test_strides_change_no_bit() -> None:
    views = make_qkv(150, 32)
    dense = [x.contiguous() for x in views]
    scattered = [x.transpose(2, 3).contiguous().transpose(2, 3) for x in views]
    for other in (dense, scattered):
        assert all(torch.equal(x, y) for x, y in zip(run_kernel(*views), run_kernel(*other), strict=True))


@needs_kernel
def test_masked_positions_change_no_bit() -> None:
    length = 300
    q, k, v = make_qkv(length, 32)
    doc_starts = make_doc_starts(length)
    before = attention_cpu.forward(q, k, v, doc_starts).out
    for position in (0, 37, 64, 150, 299):
        changed_k, changed_v = k.clone(), v.clone()
        changed_k[:, :, position] += 1
        changed_v[:, :, position] += 1
        after = attention_cpu.forward(q, changed_k, changed_v, doc_starts).out
        query = torch.arange(length)
        attends = (query >= position) & (doc_starts <= position)  # (2, T)
        changed = (before != after).any(dim=3).any(dim=1)  # (2, T)
        assert torch.equal(changed, attends)


@needs_kernel
@pytest.mark.parametrize("broken", [0, 1, 2])
def test_nan_propagates(broken: int) -> None:
    tensors = [x.clone() for x in make_qkv(100, 32)]
    tensors[broken][0, 0, 50, 3] = torch.nan
    out = attention_cpu.forward(*tensors, None).out
    assert out[0, 0, 50].isnan().all() or (broken == 2 and out[0, 0, 50, 3].isnan())
    assert out[1].isfinite().all()


@needs_kernel
def test_supported_devices_dtypes_and_head_dims() -> None:
    cpu = torch.device("cpu")
    assert attention_cpu.supports(cpu, torch.bfloat16, 64)
    assert not attention_cpu.supports(cpu, torch.bfloat16, 16)
    assert not attention_cpu.supports(cpu, torch.float32, 64)
    assert not attention_cpu.supports(torch.device("cuda"), torch.bfloat16, 64)
    assert not attention_cpu.set_enabled(False)
    try:
        assert not attention_cpu.supports(cpu, torch.bfloat16, 64)
    finally:
        assert attention_cpu.set_enabled(True)


@needs_kernel
def test_a_library_of_another_source_is_ignored(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    load = attention_cpu._load_library.__wrapped__
    assert load() is not None
    changed = tmp_path / attention_cpu.SOURCE.name
    changed.write_bytes(attention_cpu.SOURCE.read_bytes() + b"\n")
    monkeypatch.setattr(attention_cpu, "SOURCE", changed)
    assert load() is None


def test_without_a_library_the_kernel_is_disabled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention_cpu, "LIBRARY", tmp_path / "none.so")
    assert attention_cpu._load_library.__wrapped__() is None


@pytest.mark.skipif(shutil.which("cc") is None, reason="needs a C compiler")
def test_the_installed_library_has_the_digest_of_its_source() -> None:
    digest = hashlib.sha256(attention_cpu.SOURCE.read_bytes()).hexdigest()
    assert digest.encode() in attention_cpu.LIBRARY.read_bytes(), "pip install -e . compiles it"
