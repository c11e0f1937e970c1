"""From device scalars to reported numbers, with one reduction and one host sync per report."""

import time
from collections.abc import Callable

import torch

from gpt.training.train_step import StepStats
from gpt.utils.distributed import DistContext


class Meter:
    """Collects steps' statistics between two reports.

    Args:
        tokens_per_step: tokens over all processes.
        dist: the processes over which losses are summed.
        clock: seconds; monotonic.
    """

    def __init__(self, tokens_per_step: int, dist: DistContext, clock: Callable[[], float] = time.perf_counter):
        self._tokens_per_step, self._dist, self._clock = tokens_per_step, dist, clock
        self._stats: list[StepStats] = []
        self._started = clock()

    def start_window(self) -> None:
        """Begin to time: what happened since the last report (evaluation, saving) is not training."""
        self._started = self._clock()

    def add(self, stats: StepStats) -> None:
        """Keep a step's statistics, unread."""
        self._stats.append(stats)

    def report(self) -> tuple[dict[str, float], tuple[float, ...]]:
        """Metrics of the last step and the rate since the window began; the losses of every step since then."""
        loss_sums = self._dist.sum(torch.stack([stats.loss_sum for stats in self._stats]))
        losses = tuple((loss_sums / self._tokens_per_step).tolist())
        grad_norm = float(self._stats[-1].grad_norm)
        seconds = self._clock() - self._started
        metrics = {
            "train/loss": losses[-1],
            "grad_norm": grad_norm,
            "tokens_per_second": len(losses) * self._tokens_per_step / seconds,
        }
        self._stats.clear()
        return metrics, losses
