import pytest
import torch
import torch.nn.functional as F

from gpt.ops import gelu as module
from gpt.ops.gelu import gelu

ROUNDING = 2.0**-8
"""Relative rounding error of bfloat16, twice over."""
EVERY = torch.arange(2**16, dtype=torch.int32).to(torch.int16).view(torch.bfloat16)
"""Every bfloat16."""


def reference(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return torch's GELU in float64, and its derivative."""
    x = x.detach().double().requires_grad_()
    y = F.gelu(x, approximate="tanh")
    (derivative,) = torch.autograd.grad(y.sum(), x)
    return y.detach(), derivative


def test_every_bfloat16_has_the_nearest_value_and_derivative() -> None:
    x = EVERY[EVERY.abs() < 1e4].requires_grad_()
    y = gelu(x)
    (derivative,) = torch.autograd.grad(y, x, torch.ones_like(y))
    assert y.dtype == derivative.dtype == torch.bfloat16
    for ours, exact in zip((y, derivative), reference(x), strict=True):
        torch.testing.assert_close(ours.double(), exact, rtol=ROUNDING, atol=1e-6)


@pytest.mark.parametrize("shape", [(1,), (0, 3), (3, 5, 7), (2, 1031)])
def test_every_shape_at_every_tile_size(shape: tuple[int, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_ELEMENTS_PER_TILE", 100)
    x = (3 * torch.randn(shape, generator=torch.Generator().manual_seed(0))).bfloat16().requires_grad_()
    y = gelu(x)
    (grad,) = torch.autograd.grad(y, x, 0.5 * torch.ones_like(y))
    exact, derivative = reference(x)
    torch.testing.assert_close(y.double(), exact, rtol=ROUNDING, atol=1e-6)
    torch.testing.assert_close(grad.double(), 0.5 * derivative, rtol=ROUNDING, atol=1e-6)
    with torch.no_grad():
        assert torch.equal(gelu(x.mT if x.dim() > 1 else x), y.mT if x.dim() > 1 else y)


def test_nan_and_inf_propagate() -> None:
    assert gelu(torch.tensor([float("nan"), float("inf")], dtype=torch.bfloat16)).isfinite().sum() == 0


def test_float32_gelu_is_torchs() -> None:
    x = torch.linspace(-6, 6, 1001)
    assert torch.equal(gelu(x), F.gelu(x, approximate="tanh"))
