import pytest
import torch
import torch.nn.functional as F

from gpt.ops.norm import build_norm


def randn(*size: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(size, generator=torch.Generator().manual_seed(seed))


def test_rmsnorm_computes_in_float32_under_autocast() -> None:
    x = randn(4, 16).bfloat16()
    layer = build_norm("rmsnorm", 16, eps=1e-6, bias=True)
    with torch.autocast("cpu", torch.bfloat16):
        given = layer(x)
    assert given.dtype == torch.float32
    assert torch.equal(given, layer(x.float()))


@pytest.mark.parametrize("eps", [1e-5, 0.5])
@pytest.mark.parametrize("bias", [False, True])
def test_norms_are_torchs(bias: bool, eps: float) -> None:
    x, weight, shift = randn(4, 16), randn(16, seed=1), randn(16, seed=2)
    layer_norm, rms_norm = (build_norm(kind, 16, eps=eps, bias=bias) for kind in ("layernorm", "rmsnorm"))
    with torch.no_grad():
        layer_norm.weight.copy_(weight)
        rms_norm.weight.copy_(weight)
        if bias:
            layer_norm.bias.copy_(shift)
    assert torch.equal(layer_norm(x), F.layer_norm(x, (16,), weight, shift if bias else None, eps))
    assert torch.equal(rms_norm(x), F.rms_norm(x, (16,), weight, eps))
    assert [name for name, _ in rms_norm.named_parameters()] == ["weight"]


@pytest.mark.parametrize("kind", ["layernorm", "rmsnorm"])
def test_rounding_norm_has_the_bits_of_a_norm_whose_output_is_rounded(kind: str) -> None:
    x = randn(4, 16).requires_grad_()
    results = []
    for rounds in (False, True):
        layer = build_norm(kind, 16, eps=1e-5, bias=True, rounds=rounds)
        with torch.autocast("cpu", torch.bfloat16):
            out = layer(x)
        assert out.dtype == (torch.bfloat16 if rounds else torch.float32)
        out = out.bfloat16()
        results.append([out, *torch.autograd.grad(out.float().square().sum(), [x, *layer.parameters()])])
    for expected, actual in zip(*results, strict=True):
        assert torch.equal(expected, actual)
    assert build_norm(kind, 16, eps=1e-5, bias=True, rounds=True)(x).dtype == torch.float32
