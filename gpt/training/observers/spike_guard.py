"""The observer that finds loss spikes and repeatedly skipped updates."""

import math
import statistics
from collections import deque
from collections.abc import Callable, Iterable
from typing import Any

from gpt.checkpoint.rollback import RollbackTargets
from gpt.configs.observer_config import SpikeConfig
from gpt.errors import UserError
from gpt.resume.journal import Journal
from gpt.training.events import Command, Event, MetricsReady, RollBack, Save, SpikeSeen, TrainStart
from gpt.training.observer import Observer

MAD_TO_STD = 1.4826
"""Factor from median absolute deviation to standard deviation of a normal distribution (Rousseeuw and Croux 1993)."""


class SpikeGuard(Observer):
    """Compares each loss with the median of those before it, and counts skipped updates.

    Median and median absolute deviation are taken over losses without spikes, so that one spike does not hide the
    next. Losses are reduced over all ranks, so every rank finds the same.

    Each loss is judged by those before it alone, and the first spike decides what a rollback leaves out. So neither the
    log interval nor a stop or a save, which report early, changes where a run goes back to. Losses after the spike
    are not judged: the steps are trained again with other weights.

    Args:
        config: thresholds, and whether to roll back.
        journal: of the run; counts its rollbacks.
        targets: steps that a rollback may go back to.
        scaled: whether a GradScaler scales the loss, so that an overflow of the gradient is normal.
        name_documents: number of a step -> its training documents, in one line.
    """

    def __init__(
        self,
        config: SpikeConfig,
        journal: Journal,
        targets: RollbackTargets,
        *,
        scaled: bool,
        name_documents: Callable[[int], str],
    ):
        self._config, self._journal, self._targets, self._scaled = config, journal, targets, scaled
        self._name_documents = name_documents
        self._window: deque[float] = deque(maxlen=config.window)
        self._skips = 0
        self._non_finite: deque[int] = deque(maxlen=config.window)

    def on_event(self, event: Event) -> Iterable[Command | Event]:
        """Check the steps of a report.

        Raises:
            UserError: too many updates were skipped in a row, or the run was rolled back too often.
        """
        if isinstance(event, TrainStart):
            self._forget_before_target(event.step)  # the first step of a fork is a target, too
            # A spike may come before the first scheduled save; an existing checkpoint is kept.
            return [Save()] if self._config.rollback else ()
        if not isinstance(event, MetricsReady):
            return ()
        spikes: list[SpikeSeen] = []
        for step, loss in enumerate(event.losses, event.step - len(event.losses) + 1):
            if step in event.skipped:
                if self._count_skip(step, loss):
                    self._non_finite.append(step)
            elif spike := self._find_spike(step, loss):
                spikes.append(spike)
                if self._config.rollback:
                    return [spike, self._roll_back(spike)]
            self._forget_before_target(step)
        return spikes

    def _roll_back(self, spike: SpikeSeen) -> RollBack:
        """Return the command that leaves out the spike, and the skipped steps since the target before it.

        Raises:
            UserError: the run was rolled back too often.
        """
        reason = f"the loss of step {spike.step} was {spike.loss:.4f}, the median before it {spike.median:.4f}"
        if self._journal.rollbacks >= self._config.max_rollbacks:
            raise UserError(
                f"{reason}, and the run was rolled back {self._journal.rollbacks} times before; lower --lr.max-lr in a "
                "new run, or raise --spike.max-rollbacks"
            )
        bad_steps = dict.fromkeys(self._non_finite, "not finite") | {spike.step: f"spike: loss {spike.loss:.4f}"}
        return RollBack(reason, bad_steps)

    def _forget_before_target(self, step: int) -> None:
        """Forget the skipped steps up to a target, which a rollback does not train again."""
        if step in self._targets:
            self._non_finite.clear()

    def state_json(self) -> dict[str, Any]:
        """Return the window of losses, the number of updates skipped in a row, and those since the last target."""
        return {"window": list(self._window), "skips": self._skips, "non_finite": list(self._non_finite)}

    def load_json(self, saved: dict[str, Any]) -> None:
        """Load what `state_json` returned."""
        self._window = deque(saved["window"], maxlen=self._config.window)
        self._skips = saved["skips"]
        self._non_finite = deque(saved.get("non_finite", ()), maxlen=self._config.window)

    def _count_skip(self, step: int, loss: float) -> bool:
        """Return whether a skipped update was counted; an overflow that the scaler handles is not."""
        if self._scaled and math.isfinite(loss):
            return False
        self._skips += 1
        if self._skips >= self._config.max_skips:
            raise UserError(
                f"step {step}: the loss or gradient of the last {self._skips} steps was not finite, so their updates "
                f"were skipped (--spike.max-skips {self._config.max_skips}); step {step} was trained on "
                f"{self._name_documents(step)}"
            )
        return True

    def _find_spike(self, step: int, loss: float) -> SpikeSeen | None:
        """Return the spike if the loss is one; else add the loss to the window."""
        self._skips = 0
        if len(self._window) >= self._config.window // 4:
            median = statistics.median(self._window)
            deviation = MAD_TO_STD * statistics.median(abs(value - median) for value in self._window)
            rise = loss - median
            if rise > max(self._config.threshold * deviation, self._config.least_rise):
                return SpikeSeen(step, loss, median, rise / deviation if deviation else math.inf)
        self._window.append(loss)
        return None
