"""The composition's own checks."""

import pytest
import torch
from torch import nn

from gpt.errors import UserError
from gpt.pipeline import require_deterministic_operators


class Scatter(nn.Module):
    """A module whose operator has no deterministic form, on a CPU either."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(2))

    def forward(self) -> torch.Tensor:
        return torch.zeros(4).put_(torch.tensor([0, 1]), self.weight).sum()


def test_operator_without_a_deterministic_form_is_named_before_the_first_step() -> None:
    scatter, linear = Scatter(), nn.Linear(2, 1)
    torch.use_deterministic_algorithms(True)
    try:
        with pytest.raises(
            UserError, match=r"^--parallel.reproducible: put_ has no deterministic form on this device; "
        ):
            require_deterministic_operators(scatter, lambda model: model())
        require_deterministic_operators(linear, lambda model: model(torch.ones(2)).sum())
    finally:
        torch.use_deterministic_algorithms(False)
    assert linear.weight.grad is None


def test_check_of_operators_does_not_compile() -> None:
    linear = nn.Linear(2, 1)
    compiled: list[object] = []

    def record(graph: torch.fx.GraphModule, inputs: object) -> torch.fx.GraphModule:
        compiled.append(graph)
        return graph

    linear.compile(backend=record)
    require_deterministic_operators(linear, lambda model: model(torch.ones(2)).sum())
    assert not compiled
