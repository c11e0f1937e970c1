"""The observer that evaluates the model during a run."""

from collections.abc import Iterable, Sequence
from types import MappingProxyType

import torch
from torch import nn

from gpt.configs.run_plan import RunPlan
from gpt.evaluation.task import EvaluationTask
from gpt.training.events import Command, EvalEnd, Event, is_evaluated
from gpt.training.observer import Observer
from gpt.training.step_timer import StepTimer


class Evaluator(Observer):
    """Runs tasks on the steps that the plan evaluates, and publishes the metrics of each.

    Args:
        model: the bare module; in evaluation mode while a task runs.
        tasks: run in this order, on every rank.
        plan: names the steps to evaluate.
        timer: measures the evaluations; None: nobody reads their time.
    """

    def __init__(
        self, model: nn.Module, tasks: Sequence[EvaluationTask], plan: RunPlan, timer: StepTimer | None = None
    ):
        self._model, self._tasks, self._plan = model, tasks, plan
        self._timer = timer or StepTimer(torch.device("cpu"))

    def on_event(self, event: Event) -> Iterable[Command | Event]:
        """Evaluate if this step is due."""
        if not is_evaluated(event, self._plan):
            return ()
        was_training = self._model.training
        self._model.eval()
        try:
            with self._timer.phase("evaluation"):
                results = [(task.name, task.run(self._model)) for task in self._tasks]
            return [EvalEnd(event.step, name, MappingProxyType(metrics)) for name, metrics in results]
        finally:
            self._model.train(was_training)
