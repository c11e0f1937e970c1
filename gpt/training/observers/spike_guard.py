"""The observer that sees when training goes wrong: updates skipped again and again, and losses that jump."""

import math
import statistics
from collections import deque
from collections.abc import Callable, Iterable
from typing import Any

from gpt.configs.observer_config import SpikeConfig
from gpt.errors import UserError
from gpt.resume.journal import Journal
from gpt.training.events import Command, Event, MetricsReady, RollBack, Save, SpikeSeen, TrainStart
from gpt.training.observer import Observer

TO_DEVIATIONS = 1.4826
"""Median absolute deviation -> standard deviation, where losses scatter normally (Rousseeuw and Croux 1993)."""


class SpikeGuard(Observer):
    """Compares each loss with the median of those before it, and counts the updates that were skipped.

    Median and median absolute deviation, and no spike ever among the losses that they are of: so neither a spike nor a
    row of them raises the bar for the next. What it reads is reduced over the processes, so all of them find the same.

    Args:
        config: what is a spike, and what follows from it.
        journal: of the run; says how often it went back.
        scaled: whether the loss is scaled, so that an overflowing gradient is nothing out of the ordinary.
        name_documents: number of a step -> what it was trained on, in one line.
    """

    def __init__(self, config: SpikeConfig, journal: Journal, *, scaled: bool, name_documents: Callable[[int], str]):
        self._config, self._journal, self._scaled = config, journal, scaled
        self._name_documents = name_documents
        self._window: deque[float] = deque(maxlen=config.window)
        self._skips = 0

    def on_event(self, event: Event) -> Iterable[Command | Event]:
        """Judge the steps of a report.

        Raises:
            UserError: too many updates were skipped in a row, or the run went back too often.
        """
        if isinstance(event, TrainStart) and self._config.rollback:
            return [Save()]  # a spike may come before the first checkpoint; one that is there is left as it is
        if not isinstance(event, MetricsReady):
            return ()
        first = event.step - len(event.losses) + 1
        faults: dict[int, str] = {}
        spikes: list[SpikeSeen] = []
        for step, loss in enumerate(event.losses, first):
            if step in event.skipped:
                if self._count_skip(step, loss):
                    faults[step] = "not finite"
            elif spike := self._judge(step, loss):
                spikes.append(spike)
        if not (spikes and self._config.rollback):
            return spikes
        reason = (
            f"the loss of step {spikes[0].step} was {spikes[0].loss:.4f}, the median before it {spikes[0].median:.4f}"
        )
        if self._journal.rollbacks >= self._config.max_rollbacks:
            raise UserError(
                f"{reason}, and the run went back {self._journal.rollbacks} times already; lower --lr.max-lr in a new "
                "run, or raise --spike.max-rollbacks"
            )
        bad_steps = faults | {spike.step: f"spike: loss {spike.loss:.4f}" for spike in spikes}
        return [*spikes, RollBack(reason, dict(sorted(bad_steps.items())))]

    def state_json(self) -> dict[str, Any]:
        """The losses that are compared with, and the skips in a row."""
        return {"window": list(self._window), "skips": self._skips}

    def load_json(self, saved: dict[str, Any]) -> None:
        """Take them up."""
        self._window = deque(saved["window"], maxlen=self._config.window)
        self._skips = saved["skips"]

    def _count_skip(self, step: int, loss: float) -> bool:
        """Whether a skipped update was a fault, which is counted; an overflow, that the scaler sees to, is none."""
        if self._scaled and math.isfinite(loss):
            return False
        self._skips += 1
        if self._skips >= self._config.max_skips:
            raise UserError(
                f"step {step}: the loss or gradient of the last {self._skips} steps was not finite, and none of them "
                f"changed the model (--spike.max-skips); step {step} was trained on {self._name_documents(step)}"
            )
        return True

    def _judge(self, step: int, loss: float) -> SpikeSeen | None:
        """A spike, or one loss more to compare with."""
        self._skips = 0
        if len(self._window) >= self._config.window // 4:
            median = statistics.median(self._window)
            deviation = TO_DEVIATIONS * statistics.median(abs(value - median) for value in self._window)
            rise = loss - median
            if rise > max(self._config.threshold * deviation, self._config.least_rise):
                return SpikeSeen(step, loss, median, rise / deviation if deviation else math.inf)
        self._window.append(loss)
        return None
