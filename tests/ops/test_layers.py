import pytest
import torch
from transformers.activations import ACT2FN

from gpt.configs.gpt_config import GPTConfig
from gpt.ops import layers
from gpt.ops.layers import ACTIVATIONS, linear_of, make_norm, rotate, rotation, soft_cap


def some(*size: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(size, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize(("ours", "theirs"), [("gelu", "gelu_new"), ("gelu_erf", "gelu"), ("relu2", "relu2")])
def test_activations_are_transformers(ours: str, theirs: str) -> None:
    x = some(100)
    torch.testing.assert_close(ACTIVATIONS[ours](x), ACT2FN[theirs](x))


def test_swiglu_halves_its_input() -> None:
    gate, value = some(3, 4), some(3, 4, seed=1)
    expected = gate / (1 + torch.exp(-gate)) * value
    torch.testing.assert_close(ACTIVATIONS["swiglu"](torch.cat([gate, value], dim=1)), expected)


def test_rotation_turns_scores_by_distance_alone() -> None:
    q, k = some(1, 1, 1, 8), some(1, 1, 1, 8, seed=1)

    def score(at: int, other: int) -> torch.Tensor:
        turned = [rotate(x, rotation(torch.tensor([position]), 8)) for x, position in ((q, at), (k, other))]
        torch.testing.assert_close(turned[0].norm(), q.norm())
        return (turned[0] * turned[1]).sum()

    torch.testing.assert_close(score(9, 2), score(1007, 1000))
    assert abs(score(9, 2) - score(9, 3)) > 1e-2


def test_rows_may_have_positions_of_their_own() -> None:
    x = some(2, 3, 4, 8)
    positions = torch.tensor([[0, 1, 2, 3], [0, 1, 0, 1]])
    rows = [rotate(row[None], rotation(own, 8)) for row, own in zip(x, positions, strict=True)]
    assert torch.equal(rotate(x, rotation(positions, 8)), torch.cat(rows))
    assert torch.equal(rotate(x, rotation(positions, 8))[1, :, 2], x[1, :, 2])


def test_rmsnorm_computes_in_float32_under_autocast() -> None:
    x = some(4, 16).bfloat16()
    layer = make_norm(GPTConfig(norm="rmsnorm"), 16)
    with torch.autocast("cpu", torch.bfloat16):
        given = layer(x)
    assert given.dtype == torch.float32
    assert torch.equal(given, layer(x.float()))


def test_a_cap_bounds_large_logits_and_leaves_small_ones() -> None:
    logits = torch.tensor([-1e4, -0.01, 0.0, 0.01, 1e4])
    torch.testing.assert_close(soft_cap(logits, 20.0), torch.tensor([-20.0, -0.01, 0.0, 0.01, 20.0]))
    assert soft_cap(logits, 0.0) is logits


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("name", ["gelu", "gelu_erf", "relu2", "swiglu", "layernorm", "rmsnorm"])
def test_what_is_made_again_keeps_every_bit(name: str, autocast: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    function = ACTIVATIONS.get(name) or make_norm(GPTConfig(norm=name), 32)
    layer = torch.nn.Linear(16 if name == "swiglu" else 32, 8)
    x = some(2, 5, 32).requires_grad_()
    trained = [x, *layer.parameters(), *(function.parameters() if isinstance(function, torch.nn.Module) else ())]
    results, kept = [], []
    for least in (2**30, 0):
        monkeypatch.setattr(layers, "RECOMPUTE_MIN_BYTES", least)
        saved: list[torch.Tensor] = []
        with (
            torch.autograd.graph.saved_tensors_hooks(lambda t, saved=saved: saved.append(t) or t, lambda t: t),
            torch.autocast("cpu", torch.bfloat16, enabled=autocast),
        ):
            out = linear_of(function, x, layer)
        results.append([out, *torch.autograd.grad(out.float().square().sum(), trained)])
        kept.append(sum(t.numel() for t in saved))
    assert kept[1] < kept[0]
    for plain, made_again in zip(*results, strict=True):
        assert plain.dtype == made_again.dtype
        assert torch.equal(plain, made_again)
