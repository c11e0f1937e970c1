import sys
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode

from gpt.ops import cross_entropy as module
from gpt.ops.cross_entropy import fused_linear_cross_entropy, soft_cap, summed_cross_entropy
from gpt.utils.helper import IGNORED

B, T, C, V = 3, 5, 4, 7


def inputs() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    torch.manual_seed(0)
    hidden, head = (torch.randn(size, requires_grad=True) for size in ((B, T, C), (V, C)))
    targets = torch.randint(V, (B, T))
    targets[1, 2:] = IGNORED
    return hidden, head, targets


@pytest.mark.parametrize("softcap", [0.0, 1.5])
@pytest.mark.parametrize(("rows", "rows_per_tile"), [(1, 1), (4, 3), (15, 1), (15, 15), (100, 4)])
def test_fused_loss_matches_torch_at_every_chunk_and_tile_size(
    rows: int, rows_per_tile: int, softcap: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "MIN_CHUNK_ROWS", rows)
    monkeypatch.setattr(module, "CHUNK_BYTES", 0)
    monkeypatch.setattr(module, "_ELEMENTS_PER_TILE", rows_per_tile * V)
    hidden, head, targets = inputs()
    ours = fused_linear_cross_entropy(hidden, head, targets, softcap=softcap)
    logits = hidden @ head.t()
    if softcap:
        logits = softcap * (logits / softcap).tanh()
    theirs = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="sum")
    torch.testing.assert_close(ours, theirs)
    for mine, other in zip(
        torch.autograd.grad(ours, (hidden, head)), torch.autograd.grad(theirs, (hidden, head)), strict=True
    ):
        torch.testing.assert_close(mine, other)


def test_loss_is_float32_for_bfloat16_logits() -> None:
    hidden, head, targets = inputs()
    loss = fused_linear_cross_entropy(hidden.bfloat16(), head.bfloat16(), targets)
    assert loss.dtype == torch.float32
    logits = (hidden.bfloat16() @ head.bfloat16().t()).float()
    torch.testing.assert_close(loss, F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="sum"))


def test_scaled_losses_and_frozen_inputs_get_the_right_gradients() -> None:
    hidden, head, targets = inputs()
    (full,) = torch.autograd.grad(fused_linear_cross_entropy(hidden, head, targets), (head,))
    (half,) = torch.autograd.grad(0.5 * fused_linear_cross_entropy(hidden.detach(), head, targets), (head,))
    assert torch.equal(half, 0.5 * full)
    with torch.no_grad():
        assert torch.equal(
            fused_linear_cross_entropy(hidden, head, targets),
            fused_linear_cross_entropy(hidden, head, targets).detach(),
        )


@pytest.mark.parametrize("n_vocab", [65, 50_257])
def test_fused_loss_under_autocast_is_close_to_float32(n_vocab: int) -> None:
    torch.manual_seed(0)
    hidden, head = torch.randn(3, 37, 48, requires_grad=True), torch.randn(n_vocab, 48, requires_grad=True)
    targets = torch.randint(n_vocab, (3, 37))
    with torch.autocast("cpu", torch.bfloat16):
        rounded = fused_linear_cross_entropy(hidden, head, targets)
    exact = F.cross_entropy((hidden @ head.t()).flatten(0, 1), targets.flatten(), reduction="sum")
    torch.testing.assert_close(rounded, exact, rtol=3e-3, atol=0)
    for mine, theirs in zip(
        torch.autograd.grad(rounded, (hidden, head)), torch.autograd.grad(exact, (hidden, head)), strict=True
    ):
        assert mine.dtype == torch.float32
        assert (mine - theirs).norm() < 0.02 * theirs.norm()


class Largest(TorchDispatchMode):
    """Records the largest number of elements in any op's output."""

    def __init__(self) -> None:
        super().__init__()
        self.numel = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if isinstance(result, torch.Tensor):
            self.numel = max(self.numel, result.numel())
        return result


class LiveProducts(TorchDispatchMode):
    """Counts how many matmul outputs of `numel` elements are alive at the same time, at most."""

    def __init__(self, numel: int) -> None:
        super().__init__()
        self.numel, self.max = numel, 0
        self._live: list[StorageWeakRef] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if func is torch.ops.aten.mm.default and result.numel() == self.numel:
            self._live = [output for output in self._live if not output.expired()]
            self._live.append(StorageWeakRef(result.untyped_storage()))
            self.max = max(self.max, len(self._live))
        return result


def test_at_most_one_chunk_of_logits_exists(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "CHUNK_BYTES", 0)
    monkeypatch.setattr(module, "MIN_CHUNK_ROWS", 8)
    hidden, head = torch.randn(4, 64, 2, requires_grad=True), torch.randn(1000, 2, requires_grad=True)
    with Largest() as seen:
        fused_linear_cross_entropy(hidden, head, torch.randint(1000, (4, 64))).backward()
    assert seen.numel == 8 * 1000


def test_a_chunk_is_freed_before_the_next_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "CHUNK_BYTES", 0)
    monkeypatch.setattr(module, "MIN_CHUNK_ROWS", 8)
    hidden, head = torch.randn(4, 64, 2, requires_grad=True), torch.randn(1000, 2, requires_grad=True)
    with LiveProducts(8 * 1000) as products:
        fused_linear_cross_entropy(hidden, head, torch.randint(1000, (4, 64)))
    assert products.max == 1


def test_soft_cap_bounds_large_logits_and_keeps_small_ones() -> None:
    logits = torch.tensor([-1e4, -0.01, 0.0, 0.01, 1e4])
    torch.testing.assert_close(soft_cap(logits, 20.0), torch.tensor([-20.0, -0.01, 0.0, 0.01, 20.0]))
    assert soft_cap(logits, 0.0) is logits


@pytest.mark.parametrize("softcap", [0.0, 1.5])
def test_summed_and_fused_cross_entropy_agree(softcap: float) -> None:
    hidden, head, targets = inputs()
    fused = fused_linear_cross_entropy(hidden, head, targets, softcap=softcap)
    plain = summed_cross_entropy(hidden @ head.t(), targets, softcap=softcap)
    torch.testing.assert_close(plain, fused)
    rounded = summed_cross_entropy((hidden @ head.t()).bfloat16(), targets, softcap=softcap)
    assert rounded.dtype == torch.float32


def test_chunk_grows_with_a_gpus_memory_and_not_with_what_is_free(monkeypatch: pytest.MonkeyPatch) -> None:
    chunks = []
    for gigabytes in (4, 16, 24, 80, 141):
        properties = SimpleNamespace(total_memory=gigabytes * 10**9)
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device, found=properties: found)
        chunks.append(module.find_chunk_bytes(torch.device("cuda", 0)) / 2**20)
    assert chunks == [128, 128, 256, 1024, 2048]
    assert module.find_chunk_bytes(torch.device("cpu")) == module.CHUNK_BYTES


def test_float16_gradients_of_improbable_words_survive_on_cuda() -> None:
    logits = torch.tensor([[0.0, -18.0, 0.0]])  # the second word's probability is 7.6e-9, float16's smallest 6e-8
    targets = torch.tensor([0])
    rounded, scaled, exact = logits.half(), logits.half(), logits.clone()
    module._compute_tile(rounded, targets, 0.0, into_gradient=True)
    module._compute_tile(scaled, targets, 0.0, into_gradient=True, grad_scale=module.FLOAT16_GRAD_SCALE)
    module._compute_tile(exact, targets, 0.0, into_gradient=True)
    assert rounded[0, 1] == 0
    torch.testing.assert_close(scaled.float() / module.FLOAT16_GRAD_SCALE, exact, rtol=0.01, atol=0)


def test_loss_goes_on_without_a_kernel_that_does_not_compile(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def compute_chunk(*args: object, **options: object) -> None:
        raise RuntimeError("no C compiler\nfound")

    monkeypatch.setitem(sys.modules, "gpt.ops.cross_entropy_triton", SimpleNamespace(compute_chunk=compute_chunk))
    monkeypatch.setattr(module, "_triton_works", True)
    given, expected = torch.randn(2, 3, 7)[:1].repeat(2, 1, 1)
    targets = torch.tensor([1, 2, 3])
    for _ in range(2):
        ours = module._compute_cuda_chunk(given, targets, 0.0, True, 1.0)
        theirs = module._compute_tile(expected, targets, 0.0, into_gradient=True)
        assert torch.equal(ours, theirs)
        assert torch.equal(given, expected)
    assert caplog.text.count("the loss's Triton kernel does not work here (no C compiler)") == 1
