"""`recompute_in_backward` and `Linear`: the same bits as torch's own modules, and less saved for backward."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from gpt.ops import recompute
from gpt.ops.activations import ACTIVATIONS
from gpt.ops.linear import Linear
from gpt.ops.norm import build_norm
from gpt.ops.recompute import recomputable_node, recompute_in_backward

Function = Callable[[torch.Tensor], torch.Tensor]
NEVER, ALWAYS = 2**30, 0


def randn(*size: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(size, generator=torch.Generator().manual_seed(seed))


def build_function(name: str) -> Function:
    return ACTIVATIONS.get(name) or build_norm(name, 32, eps=1e-5, bias=True)


def count_saved(compute: Callable[[], torch.Tensor]) -> tuple[torch.Tensor, int]:
    """Return what `compute` returns, and how many numbers it saves for backward."""
    saved: list[torch.Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):  # type: ignore[func-returns-value]
        out = compute()
    return out, sum(tensor.numel() for tensor in saved)


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("name", ["gelu", "gelu_erf", "relu2", "swiglu", "layernorm", "rmsnorm"])
def test_recomputation_keeps_every_bit_and_saves_less(
    name: str, autocast: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(0)
    function, layer = build_function(name), Linear(16 if name == "swiglu" else 32, 8)
    x = randn(2, 5, 32).requires_grad_()
    trained = [x, *layer.parameters(), *(function.parameters() if isinstance(function, nn.Module) else ())]
    results, saved = [], []
    for min_bytes in (NEVER, ALWAYS):
        monkeypatch.setattr(recompute, "RECOMPUTE_MIN_BYTES", min_bytes)
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            out, n_saved = count_saved(lambda: layer(function(x)))
        results.append([out, *torch.autograd.grad(out.float().square().sum(), trained)])
        saved.append(n_saved)
    assert saved[1] < saved[0]
    for plain, ours in zip(*results, strict=True):
        assert plain.dtype == ours.dtype
        assert torch.equal(plain, ours)


def test_the_input_of_a_linear_is_not_saved_where_it_is_recomputed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(recompute, "RECOMPUTE_MIN_BYTES", ALWAYS)
    layer, x = Linear(32, 8), randn(50, 32).requires_grad_()
    y = recompute_in_backward(torch.tanh, x)
    _, n_saved = count_saved(lambda: layer(y))
    assert n_saved == layer.weight.numel()
    _, n_saved = count_saved(lambda: layer(y * 1))
    assert n_saved == layer.weight.numel() + y.numel()


def test_a_recomputable_input_serves_several_layers_with_one_recomputation(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(recompute, "RECOMPUTE_MIN_BYTES", ALWAYS)
    calls: list[int] = []

    def function(x: torch.Tensor) -> torch.Tensor:
        calls.append(1)
        return x.tanh()

    x, ours, plain = randn(5, 8).requires_grad_(), [Linear(8, 3), Linear(8, 3)], nn.Linear(8, 3)
    y = recompute_in_backward(function, x)
    grads = torch.autograd.grad(sum(layer(y).square().sum() for layer in (*ours, plain)), x)  # type: ignore[arg-type]
    assert len(calls) == 2  # forward, and once in backward
    y = x.tanh()
    layers = [lambda y, m=m: F.linear(y, m.weight, m.bias) for m in (*ours, plain)]  # type: ignore[misc]
    expected = torch.autograd.grad(sum(layer(y).square().sum() for layer in layers), x)  # type: ignore[arg-type]
    torch.testing.assert_close(grads, expected)


def change_in_place(y: torch.Tensor) -> torch.Tensor:
    return y.mul_(2)


def change_in_place_unseen(y: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        y.mul_(2)
    return y


@pytest.mark.parametrize(
    "change", [lambda y: y * 2, lambda y: y.view(-1, 8), lambda y: y.detach(), change_in_place, change_in_place_unseen]
)
def test_a_tensor_that_is_not_what_the_node_computed_is_saved(
    change: Callable[[torch.Tensor], torch.Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(recompute, "RECOMPUTE_MIN_BYTES", ALWAYS)
    x, layer = randn(5, 8).requires_grad_(), Linear(8, 3)
    y = recompute_in_backward(torch.tanh, x)
    assert recomputable_node(y) is not None
    y = change(y)
    assert recomputable_node(y) is None
    (grad,) = torch.autograd.grad(layer(y).sum(), layer.weight)
    torch.testing.assert_close(grad, y.detach().sum(0).expand(3, -1))


@pytest.mark.parametrize("frozen", ["x", "weight", "bias", "norm"])
def test_a_frozen_tensor_gets_no_gradient_and_changes_no_other(frozen: str, monkeypatch: pytest.MonkeyPatch) -> None:
    x, layer, norm = randn(5, 8).requires_grad_(), Linear(8, 3), build_norm("layernorm", 8, eps=1e-5, bias=True)
    tensors: dict[str, Any] = {"x": x, "weight": layer.weight, "bias": layer.bias, "norm": norm.weight}
    tensors[frozen].requires_grad_(False)
    results = []
    for min_bytes in (NEVER, ALWAYS):
        monkeypatch.setattr(recompute, "RECOMPUTE_MIN_BYTES", min_bytes)
        for tensor in tensors.values():
            tensor.grad = None
        layer(norm(x)).square().sum().backward()
        results.append({name: tensor.grad for name, tensor in tensors.items()})
    for name, grad in results[0].items():
        assert (grad is None) == (name == frozen) == (results[1][name] is None)
        assert grad is None or torch.equal(grad, results[1][name])


def test_a_graph_may_be_used_twice_and_partly(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(recompute, "RECOMPUTE_MIN_BYTES", ALWAYS)
    x, layer, norm = randn(5, 8).requires_grad_(), Linear(8, 3), build_norm("rmsnorm", 8, eps=1e-6, bias=False)
    loss = layer(norm(x)).square().sum()
    (weight_grad,) = torch.autograd.grad(loss, layer.weight, retain_graph=True)
    first = torch.autograd.grad(loss, (x, layer.weight, norm.weight), retain_graph=True)
    second = torch.autograd.grad(loss, (x, layer.weight, norm.weight))
    assert torch.equal(weight_grad, first[1])
    assert all(torch.equal(one, two) for one, two in zip(first, second, strict=True))


@pytest.mark.parametrize("autocast", [False, True])
def test_activation_checkpointing_keeps_every_bit(autocast: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Recompute inside a recomputation, which unpacks each saved tensor only once."""
    monkeypatch.setattr(recompute, "RECOMPUTE_MIN_BYTES", ALWAYS)
    torch.manual_seed(0)
    model = nn.Sequential(build_function("layernorm"), Linear(32, 64))  # type: ignore[arg-type]
    head = Linear(64, 8)

    def compute(x: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = head(ACTIVATIONS["gelu"](model(x)))
        return out

    x = randn(4, 32).requires_grad_()
    parameters = [x, *model.parameters(), *head.parameters()]
    results = []
    for run in (compute, lambda x: checkpoint(compute, x, use_reentrant=False)):
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            out = run(x)
        results.append([out, *torch.autograd.grad(out.float().square().sum(), parameters)])
    assert all(torch.equal(one, two) for one, two in zip(*results, strict=True))


def test_second_derivatives_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(recompute, "RECOMPUTE_MIN_BYTES", ALWAYS)
    x, layer = randn(5, 8).requires_grad_(), Linear(8, 3)
    (grad,) = torch.autograd.grad(layer(recompute_in_backward(torch.tanh, x)).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.sum().backward()


def test_the_compiler_sees_plain_functions(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(recompute, "RECOMPUTE_MIN_BYTES", ALWAYS)
    model = nn.Sequential(build_function("layernorm"), Linear(32, 8))  # type: ignore[arg-type]
    x = randn(5, 32).requires_grad_()
    (expected,) = torch.autograd.grad(model(x).square().sum(), x)
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    out, n_saved = count_saved(lambda: compiled(x))
    assert torch.equal(torch.autograd.grad(out.square().sum(), x)[0], expected)
    assert n_saved > x.numel() + sum(p.numel() for p in model.parameters()), "the norm's output is saved as in eager"


def test_without_gradients_nothing_is_marked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(recompute, "RECOMPUTE_MIN_BYTES", ALWAYS)
    with torch.no_grad():
        assert recomputable_node(recompute_in_backward(torch.tanh, randn(5, 8).requires_grad_())) is None
    assert recomputable_node(recompute_in_backward(torch.tanh, randn(5, 8))) is None
