from collections.abc import Callable

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrize

from gpt.ops import recompute
from gpt.ops.linear import FusedLinear, Linear, is_plain_linear


def build(modify: Callable[[nn.Linear], object] = lambda layer: None, *, bias: bool = False) -> nn.Linear:
    layer = Linear(4, 3, bias=bias)
    modify(layer)
    return layer


def register_identity(layer: nn.Linear) -> None:
    parametrize.register_parametrization(layer, "weight", nn.Identity())


def replace_forward(layer: nn.Linear) -> None:
    layer.forward = lambda x: x  # type: ignore[method-assign]


def test_a_linear_is_plain_where_calling_it_is_one_matmul() -> None:
    assert is_plain_linear(build())
    assert is_plain_linear(nn.Linear(4, 3, bias=False))
    assert not is_plain_linear(build(bias=True))
    assert not is_plain_linear(FusedLinear(4, (1, 2), bias=False))
    assert not is_plain_linear(nn.Sequential(build()))


@pytest.mark.parametrize(
    "modify",
    [
        register_identity,
        replace_forward,
        lambda layer: layer.register_forward_hook(lambda *args: None),
        lambda layer: layer.register_forward_pre_hook(lambda *args: None),
        lambda layer: layer.register_full_backward_hook(lambda *args: None),
        lambda layer: layer.register_full_backward_pre_hook(lambda *args: None),
    ],
)
def test_a_linear_with_anything_attached_is_not_plain(modify: Callable[[nn.Linear], object]) -> None:
    assert not is_plain_linear(build(modify))


def test_under_a_global_hook_no_linear_is_plain() -> None:
    handle = nn.modules.module.register_module_forward_hook(lambda *args: None)
    try:
        assert not is_plain_linear(build())
    finally:
        handle.remove()
    assert is_plain_linear(build())


@pytest.mark.parametrize("size", [(4,), (5, 4), (2, 5, 4), (0, 4)])
@pytest.mark.parametrize("bias", [False, True])
def test_every_shape_has_the_bits_of_torchs_linear(
    size: tuple[int, ...], bias: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    layer = build(bias=bias)
    x = torch.randn(size, generator=torch.Generator().manual_seed(0)).requires_grad_()
    results = []
    for min_bytes in (2**30, 0):
        monkeypatch.setattr(recompute, "RECOMPUTE_MIN_BYTES", min_bytes)
        out = layer(x)
        results.append([out, *torch.autograd.grad(out.square().sum(), [x, *layer.parameters()])])
    assert all(torch.equal(one, two) for one, two in zip(*results, strict=True))


def test_under_autocast_no_rounded_weight_is_saved(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(recompute, "RECOMPUTE_MIN_BYTES", 0)
    layer, x, saved = build(), torch.randn(5, 4).requires_grad_(), []
    with (
        torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t),  # type: ignore[func-returns-value]
        torch.autocast("cpu", torch.bfloat16),
    ):
        assert layer(x).dtype == torch.bfloat16
    assert [tensor.dtype for tensor in saved] == [torch.bfloat16, torch.float32]
    assert saved[1].data_ptr() == layer.weight.data_ptr()
