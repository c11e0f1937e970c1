"""The observer that decides when to evaluate."""

from collections.abc import Iterable, Sequence
from types import MappingProxyType

from torch import nn

from gpt.configs.run_plan import RunPlan
from gpt.evaluation.task import EvaluationTask
from gpt.training.events import Command, EvalEnd, Event, is_evaluated
from gpt.training.observer import Observer


class Evaluator(Observer):
    """Runs its tasks on the plan's steps and publishes each one's metrics.

    Args:
        model: the bare module; in evaluation mode during a task, and put back after it.
        tasks: run in this order, by every rank.
        plan: says when.
    """

    def __init__(self, model: nn.Module, tasks: Sequence[EvaluationTask], plan: RunPlan):
        self._model, self._tasks, self._plan = model, tasks, plan

    def on_event(self, event: Event) -> Iterable[Command | Event]:
        """Evaluate after a step that is due."""
        if not is_evaluated(event, self._plan):
            return ()
        was_training = self._model.training
        self._model.eval()
        try:
            return [EvalEnd(event.step, task.name, MappingProxyType(task.run(self._model))) for task in self._tasks]
        finally:
            self._model.train(was_training)
