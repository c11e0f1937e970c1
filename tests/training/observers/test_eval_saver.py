from dataclasses import replace

from gpt.training.events import EvalEnd, Save, StepEnd
from gpt.training.observers.eval_saver import EvalSaver
from tests.training.example_events import PLAN

PLAN_OF_FIVES = replace(PLAN, checkpoint_interval=5, max_steps=100)


def test_scheduled_checkpoint_gets_the_metrics() -> None:
    observer = EvalSaver(PLAN_OF_FIVES, None)
    metrics = {"val/loss": 2.0, "val/bpb": 1.0}
    assert list(observer.on_event(EvalEnd(10, "val", metrics))) == [Save(metrics)]
    assert list(observer.on_event(EvalEnd(11, "val", metrics))) == []
    assert list(observer.on_event(EvalEnd(10, "other", {"accuracy": 1.0}))) == []
    assert list(observer.on_event(StepEnd(10, 10))) == []


def test_best_val_loss_is_saved() -> None:
    observer = EvalSaver(PLAN_OF_FIVES, lambda loss: loss < 3)
    assert list(observer.on_event(EvalEnd(11, "val", {"val/loss": 2.0}))) == [Save({"val/loss": 2.0})]
    assert list(observer.on_event(EvalEnd(12, "val", {"val/loss": 3.0}))) == []
    assert list(observer.on_event(EvalEnd(13, "val", {"val/loss": float("nan")}))) == []
