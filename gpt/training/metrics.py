"""From device scalars to reported numbers, with one reduction and one host sync per report."""

import math
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
        flops_per_token: arithmetic of a step, by its tokens.
        peak: FLOP/s that all processes together reach at best.
        peak_memory: the most bytes that this process needed so far; None where nobody tells.
        clock: seconds; monotonic.
    """

    def __init__(
        self,
        tokens_per_step: int,
        skipped_updates: torch.Tensor,
        dist: DistContext,
        *,
        flops_per_token: float,
        peak: float,
        peak_memory: Callable[[], int | None] = lambda: None,
        clock: Callable[[], float] = time.perf_counter,
    ):
        self._tokens_per_step, self._skipped_updates = tokens_per_step, skipped_updates
        self._dist, self._clock = dist, clock
        self._mfu_of_rate = flops_per_token / peak
        self._peak_memory = peak_memory
        self._stats: list[StepStats] = []
        self._started = clock()

    def start_window(self) -> None:
        """Begin to time: what happened since the last report (evaluation, saving) is not training."""
        self._started = self._clock()

    def add(self, stats: StepStats) -> None:
        """Keep a step's statistics, unread."""
        self._stats.append(stats)

    def report(self) -> tuple[dict[str, float], tuple[float, ...], tuple[bool, ...]]:
        """Metrics of the last step and the rate since the window began.

        And of every step since then the loss, and whether its update was skipped.
        """
        n_targets = torch.tensor([max(1, stats.n_targets) for stats in self._stats])
        sums = self._dist.sum(torch.stack([stats.loss_sum for stats in self._stats]))
        losses = sums / n_targets.to(sums.device, non_blocking=True)
        norms = torch.stack([stats.grad_norm for stats in self._stats])
        count = self._skipped_updates.to(losses.dtype)[None]
        *values, skipped_updates = torch.cat([losses, norms, count]).tolist()  # the one sync
        n_steps = len(self._stats)
        values, grad_norms = values[:n_steps], values[n_steps:]
        rate = n_steps * self._tokens_per_step / (self._clock() - self._started)
        metrics = {
            "train/loss": values[-1],
            "grad_norm": grad_norms[-1],
            "tokens_per_second": rate,
            "mfu": rate * self._mfu_of_rate,  # model FLOPs utilization (Chowdhery et al. 2022, "PaLM", section 4.1)
        }
        if (needed := self._peak_memory()) is not None:
            metrics["peak_memory_bytes"] = self._dist.max(needed)
        if skipped_updates:
            metrics["skipped_updates"] = int(skipped_updates)
        self._stats.clear()
        return metrics, tuple(values), tuple(not math.isfinite(norm) for norm in grad_norms)
