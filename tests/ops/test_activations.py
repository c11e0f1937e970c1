import pytest
import torch
from transformers.activations import ACT2FN

from gpt.ops.activations import ACTIVATIONS


def randn(*size: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(size, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize(("ours", "theirs"), [("gelu", "gelu_new"), ("gelu_erf", "gelu"), ("relu2", "relu2")])
def test_activations_match_transformers(ours: str, theirs: str) -> None:
    x = randn(100)
    torch.testing.assert_close(ACTIVATIONS[ours](x), ACT2FN[theirs](x))


def test_swiglu_gates_the_second_half_with_the_first() -> None:
    gate, value = randn(3, 4), randn(3, 4, seed=1)
    expected = gate / (1 + torch.exp(-gate)) * value
    torch.testing.assert_close(ACTIVATIONS["swiglu"](torch.cat([gate, value], dim=1)), expected)
