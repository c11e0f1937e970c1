import pytest
import torch
from transformers.activations import ACT2FN

from gpt.configs.gpt_config import GPTConfig
from gpt.models.layers import ACTIVATIONS, make_norm, rotate, rotation, soft_cap


def some(*size: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(size, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize(("ours", "theirs"), [("gelu", "gelu_new"), ("relu2", "relu2")])
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
