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
        skipped_updates: device counter; reported once there are any.
        dist: the processes over which losses are summed.
        clock: seconds; monotonic.
    """

    def __init__(
        self,
        tokens_per_step: int,
        skipped_updates: torch.Tensor,
        dist: DistContext,
        clock: Callable[[], float] = time.perf_counter,
    ):
        self._tokens_per_step, self._skipped_updates = tokens_per_step, skipped_updates
        self._dist, self._clock = dist, clock
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
        n_targets = torch.tensor([max(1, stats.n_targets) for stats in self._stats])
        sums = self._dist.sum(torch.stack([stats.loss_sum for stats in self._stats]))
        losses = sums / n_targets.to(sums.device, non_blocking=True)
        others = torch.stack([self._stats[-1].grad_norm, self._skipped_updates.float()])
        *values, grad_norm, skipped_updates = torch.cat([losses, others]).tolist()  # the one sync
        seconds = self._clock() - self._started
        metrics = {
            "train/loss": values[-1],
            "grad_norm": grad_norm,
            "tokens_per_second": len(values) * self._tokens_per_step / seconds,
        }
        if skipped_updates:
            metrics["skipped_updates"] = int(skipped_updates)
        self._stats.clear()
        return metrics, tuple(values)
