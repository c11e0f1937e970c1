import hashlib
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from gpt.ops import attention_cpu

BEGINS = [0, 1, 1, 1, 4, 5, 5, 7]
"""Of the documents of a row, in eighths of it."""

needs_kernel = pytest.mark.skipif(
    not attention_cpu.is_enabled(), reason="no compiler at the installation, or no AVX512_BF16"
)


@pytest.fixture
def one_and_two_threads() -> Iterator[tuple[int, int]]:
    before = torch.get_num_threads()
    yield 1, 2
    torch.set_num_threads(before)


def random(*shape: int, seed: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).bfloat16()


def heads(length: int, width: int) -> list[torch.Tensor]:
    """q, k and v of two rows and three heads, cut out of one tensor as a model does it."""
    parts = random(2, length, 9 * width, seed=0).split(3 * width, dim=2)
    return [part.view(2, length, 3, width).transpose(1, 2) for part in parts]


def first_seen(length: int) -> torch.Tensor:
    """(2, T) int32: a row with documents and a row that is one."""
    eighth = torch.arange(length) * 8 // length
    starts = torch.tensor([begin * length // 8 for begin in BEGINS])
    return torch.stack([starts[eighth].clamp(max=torch.arange(length)), torch.zeros(length)]).int()


def results(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, begins: torch.Tensor | None = None
) -> list[torch.Tensor]:
    """What comes out, and the gradients of what went in."""
    saved = attention_cpu.forward(q, k, v, begins)
    return [saved.out, *attention_cpu.backward(saved, random(*q.shape, seed=1))]


def expected(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, begins: torch.Tensor | None = None
) -> list[torch.Tensor]:
    """The same by torch in float32."""
    inputs = [x.float().detach().requires_grad_() for x in (q, k, v)]
    position = torch.arange(q.shape[2])
    seen = (position <= position[:, None]).expand(len(q), 1, -1, -1)
    if begins is not None:
        seen = seen & (position >= begins[:, None, :, None])
    out = F.scaled_dot_product_attention(*inputs, attn_mask=seen)
    return [out, *torch.autograd.grad(out, inputs, random(*q.shape, seed=1).float())]


@needs_kernel
@pytest.mark.parametrize("with_documents", [False, True])
@pytest.mark.parametrize("width", [32, 64, 96, 128])
@pytest.mark.parametrize("length", [1, 7, 64, 65, 127, 129, 400])
def test_torch_finds_the_same_in_float32(length: int, width: int, with_documents: bool) -> None:
    begins = first_seen(length) if with_documents else None
    tensors = heads(length, width)
    for found, wanted in zip(results(*tensors, begins), expected(*tensors, begins), strict=True):
        assert found.dtype == torch.bfloat16
        assert found.shape == wanted.shape
        # A number in bfloat16 is 2^-9 of itself wrong at most; here two are multiplied.
        assert (found.float() - wanted).norm() <= 0.004 * wanted.norm() + 1e-5


@needs_kernel
def test_scores_of_any_size_are_right() -> None:
    q, k, v = heads(200, 64)
    for found, wanted in zip(results(50 * q, k, v), expected(50 * q, k, v), strict=True):
        assert (found.float() - wanted).norm() <= 0.02 * wanted.norm()


@needs_kernel
def test_threads_change_no_bit(one_and_two_threads: tuple[int, int]) -> None:
    found = []
    for threads in one_and_two_threads:
        torch.set_num_threads(threads)
        found.append(results(*heads(300, 64), first_seen(300)))
    assert all(torch.equal(one, two) for one, two in zip(*found, strict=True))


@needs_kernel
def test_where_numbers_lie_changes_no_bit() -> None:
    views = heads(150, 32)
    dense = [x.contiguous() for x in views]
    scattered = [x.transpose(2, 3).contiguous().transpose(2, 3) for x in views]
    for other in (dense, scattered):
        assert all(torch.equal(x, y) for x, y in zip(results(*views), results(*other), strict=True))


@needs_kernel
def test_nothing_comes_from_what_is_not_seen() -> None:
    length = 300
    q, k, v = heads(length, 32)
    begins = first_seen(length)
    before = attention_cpu.forward(q, k, v, begins).out
    for position in (0, 37, 64, 150, 299):
        k_then, v_then = k.clone(), v.clone()
        k_then[:, :, position] += 1
        v_then[:, :, position] += 1
        after = attention_cpu.forward(q, k_then, v_then, begins).out
        query = torch.arange(length)
        sees = (query >= position) & (begins <= position)  # (2, T)
        changed = (before != after).any(dim=3).any(dim=1)  # (2, T)
        assert torch.equal(changed, sees)


@needs_kernel
@pytest.mark.parametrize("broken", [0, 1, 2])
def test_what_is_no_number_is_not_hidden(broken: int) -> None:
    tensors = [x.clone() for x in heads(100, 32)]
    tensors[broken][0, 0, 50, 3] = torch.nan
    out = attention_cpu.forward(*tensors, None).out
    assert out[0, 0, 50].isnan().all() or (broken == 2 and out[0, 0, 50, 3].isnan())
    assert out[1].isfinite().all()


@needs_kernel
def test_it_serves_what_it_was_made_for() -> None:
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
def test_a_library_of_another_source_is_not_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    load = attention_cpu._load_library.__wrapped__
    assert load() is not None
    changed = tmp_path / attention_cpu.SOURCE.name
    changed.write_bytes(attention_cpu.SOURCE.read_bytes() + b"\n")
    monkeypatch.setattr(attention_cpu, "SOURCE", changed)
    assert load() is None


def test_without_a_library_torch_computes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention_cpu, "LIBRARY", tmp_path / "none.so")
    assert attention_cpu._load_library.__wrapped__() is None


@pytest.mark.skipif(shutil.which("cc") is None, reason="needs a C compiler")
def test_the_installation_compiled_what_is_here() -> None:
    digest = hashlib.sha256(attention_cpu.SOURCE.read_bytes()).hexdigest()
    assert digest.encode() in attention_cpu.LIBRARY.read_bytes(), "pip install -e . compiles it"
