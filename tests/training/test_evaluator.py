from dataclasses import replace

import pytest
import torch
from torch import nn

from gpt.training.evaluator import Evaluator
from gpt.training.events import EvalEnd, MetricsReady, StepEnd
from tests.training.example_events import PLAN


class Task:
    name = "count"

    def __init__(self) -> None:
        self.modes: list[bool] = []

    def run(self, model: nn.Module) -> dict[str, float]:
        self.modes.append(model.training)
        return {"count": float(len(self.modes))}


def test_tasks_run_on_the_steps_of_the_plan_in_evaluation_mode() -> None:
    task, model = Task(), nn.Dropout()
    evaluator = Evaluator(model, [task], replace(PLAN, eval_interval=5))
    published = [event for step in range(1, 21) for event in evaluator.on_event(StepEnd(step, step))]
    assert published == [EvalEnd(5 * n, "count", {"count": float(n)}) for n in range(1, 5)]
    assert task.modes == [False] * 4
    assert model.training


def test_other_events_are_ignored() -> None:
    evaluator = Evaluator(nn.Identity(), [Task()], PLAN)
    assert list(evaluator.on_event(MetricsReady(20, {}, ()))) == []
    evaluator.close(None)


def test_training_mode_is_restored_when_a_task_fails() -> None:
    class Failing(Task):
        def run(self, model: nn.Module) -> dict[str, float]:
            raise RuntimeError

    model = nn.Linear(1, 1)
    with pytest.raises(RuntimeError):
        Evaluator(model, [Failing()], PLAN).on_event(StepEnd(20, 1))
    assert model.training
    assert torch.is_grad_enabled()
