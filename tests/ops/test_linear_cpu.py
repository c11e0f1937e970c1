import hashlib
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from gpt.ops import linear_cpu

needs_kernel = pytest.mark.skipif(
    not linear_cpu.supports(torch.zeros(1, 1)), reason="no compiler at installation, or no AVX512_BF16"
)


@pytest.fixture
def one_and_two_threads() -> Iterator[tuple[int, int]]:
    before = torch.get_num_threads()
    yield 1, 2
    torch.set_num_threads(before)


def random(*shape: int, seed: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@needs_kernel
@pytest.mark.parametrize("rows", [1, 2, 3, 4, 5, 6, 7, 8, 9, 19])
@pytest.mark.parametrize(("n_in", "n_out"), [(32, 1), (33, 7), (1, 5), (63, 50), (768, 129)])
def test_kernel_equals_float32(rows: int, n_in: int, n_out: int) -> None:
    x, weight, bias = random(rows, n_in, seed=0), random(n_out, n_in, seed=1).bfloat16(), random(n_out, seed=2)
    expected = F.linear(x.bfloat16().float(), weight.float(), bias)
    out = linear_cpu.forward(x, weight, bias)
    assert out.dtype == torch.bfloat16
    torch.testing.assert_close(out, expected.bfloat16(), rtol=2**-7, atol=1e-4)
    without_bias = linear_cpu.forward(x[:, None], weight, None)
    torch.testing.assert_close(without_bias[:, 0].float(), expected - bias, rtol=2**-7, atol=1e-2)


@needs_kernel
def test_neither_threads_nor_other_rows_change_a_bit(one_and_two_threads: tuple[int, int]) -> None:
    x, weight = random(8, 200, seed=0), random(301, 200, seed=1).bfloat16()
    outputs = []
    for threads in one_and_two_threads:
        torch.set_num_threads(threads)
        outputs += [linear_cpu.forward(x, weight, None), linear_cpu.forward(x[3:4], weight, None).expand(8, -1)]
    assert torch.equal(outputs[0], outputs[2])
    assert torch.equal(outputs[1], outputs[3])
    assert torch.equal(outputs[0][3], outputs[1][3])


@needs_kernel
def test_only_few_rows_on_a_cpu_are_supported() -> None:
    assert linear_cpu.supports(torch.zeros(2, 4, 16))
    assert not linear_cpu.supports(torch.zeros(3, 3, 16))
    assert not linear_cpu.supports(torch.zeros(1, 16, device="meta"))


def test_copies_in_huge_pages_are_apart_and_aligned() -> None:
    tensors = [random(3, 5, seed=0), random(70, seed=1), random(2, 3, 4, seed=2)]
    copies = linear_cpu.copy_to_huge_pages(tensors, torch.bfloat16)
    for tensor, copy in zip(tensors, copies, strict=True):
        assert torch.equal(copy, tensor.bfloat16())
        assert copy.data_ptr() % linear_cpu.ALIGNMENT_BYTES == 0 and copy.is_contiguous()
    assert copies[0].data_ptr() % linear_cpu.HUGE_PAGE_BYTES == 0
    copies[0].fill_(1.0)
    assert torch.equal(copies[1], tensors[1].bfloat16())


def test_library_of_another_source_is_not_used(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    source = Path(shutil.copy(linear_cpu.SOURCE, tmp_path))
    source.write_text(source.read_text() + "\n")
    monkeypatch.setattr(linear_cpu, "SOURCE", source)
    assert linear_cpu._load_library.__wrapped__() is None


@needs_kernel
def test_compiled_library_is_that_of_the_source() -> None:
    digest = hashlib.sha256(linear_cpu.SOURCE.read_bytes()).hexdigest()
    assert digest.encode() in linear_cpu.LIBRARY.read_bytes(), "pip install -e . compiles it"
