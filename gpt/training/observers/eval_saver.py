"""The observer that gives a checkpoint its evaluation, and the best evaluation its checkpoint."""

from collections.abc import Callable, Iterable

from gpt.checkpoint.manifest import VAL_LOSS
from gpt.configs.run_plan import RunPlan
from gpt.training.events import Command, EvalEnd, Event, Save
from gpt.training.observer import Observer


class EvalSaver(Observer):
    """Hands metrics to a checkpoint that is due at the same step, and asks for one where an evaluation is the best.

    Args:
        plan: says which steps are saved anyway.
        improves: whether a val/loss is below those of all checkpoints; None: the best is not asked for.
    """

    def __init__(self, plan: RunPlan, improves: Callable[[float], bool] | None):
        self._plan, self._improves = plan, improves

    def on_event(self, event: Event) -> Iterable[Command | Event]:
        """Save after an evaluation, where there is reason to."""
        if not (isinstance(event, EvalEnd) and VAL_LOSS in event.metrics):
            return ()
        is_best = self._improves is not None and self._improves(event.metrics[VAL_LOSS])
        return [Save(event.metrics)] if is_best or self._plan.saves_at(event.step) else ()
