"""The protocol of evaluation tasks."""

from typing import Protocol

from torch import nn


class EvaluationTask(Protocol):
    """Scores a model; every rank runs it and returns the same metrics.

    To add one: docs/extending.md, "An evaluation task".
    """

    name: str

    def run(self, model: nn.Module) -> dict[str, float]:
        """Return metrics by their full names, such as `val/loss`; `model` is in evaluation mode."""
        ...
