"""The observer that saves a checkpoint after an evaluation."""

from collections.abc import Callable, Iterable

from gpt.checkpoint.manifest import VAL_LOSS
from gpt.configs.run_plan import RunPlan
from gpt.training.events import Command, EvalEnd, Event, Save
from gpt.training.observer import Observer


class EvalSaver(Observer):
    """Records metrics in the checkpoint that is due at the same step, and saves a checkpoint of the best val/loss.

    Args:
        plan: names the steps that are saved anyway.
        improves: returns whether a val/loss is below those of all checkpoints; None saves no best checkpoint.
    """

    def __init__(self, plan: RunPlan, improves: Callable[[float], bool] | None):
        self._plan, self._improves = plan, improves

    def on_event(self, event: Event) -> Iterable[Command | Event]:
        """Save if a checkpoint is due or val/loss is the lowest so far."""
        if not (isinstance(event, EvalEnd) and VAL_LOSS in event.metrics):
            return ()
        is_best = self._improves is not None and self._improves(event.metrics[VAL_LOSS])
        return [Save(event.metrics)] if is_best or self._plan.saves_at(event.step) else ()
