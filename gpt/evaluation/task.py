"""What can be evaluated during a run."""

from typing import Protocol

from torch import nn


class EvaluationTask(Protocol):
    """A score of the model; every process runs it, and all get the same numbers."""

    name: str

    def run(self, model: nn.Module) -> dict[str, float]:
        """Metrics by their full names, such as `val/loss`; `model` is in evaluation mode."""
        ...
