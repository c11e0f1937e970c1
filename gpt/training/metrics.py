"""Turns device scalars of steps into reported metrics, with one reduction and one host sync per report."""

import math
import time
from collections.abc import Callable

import torch

from gpt.training.train_step import StepStats
from gpt.utils.distributed import DistContext


class Meter:
    """Collects the statistics of the steps between two reports.

    Args:
        tokens_per_step: tokens of an update, over all ranks.
        skipped_updates: device counter; reported once it is not 0.
        dist: ranks over which losses are summed.
        flops_per_token: model FLOPs of forward and backward.
        peak_flops: measured peak FLOP/s of all ranks together.
        data_sheet_flops: peak FLOP/s of all ranks together by the GPU's data sheet; None if unknown.
        peak_memory: returns the largest number of bytes that this rank has allocated, None if unknown.
        clock: monotonic, in seconds.
    """

    def __init__(
        self,
        tokens_per_step: int,
        skipped_updates: torch.Tensor,
        dist: DistContext,
        *,
        flops_per_token: float,
        peak_flops: float,
        data_sheet_flops: float | None = None,
        peak_memory: Callable[[], int | None] = lambda: None,
        clock: Callable[[], float] = time.perf_counter,
    ):
        self._tokens_per_step, self._skipped_updates = tokens_per_step, skipped_updates
        self._dist, self._clock = dist, clock
        self._flops_per_token, self._peak_flops = flops_per_token, peak_flops
        self._data_sheet_flops = data_sheet_flops
        self._peak_memory = peak_memory
        self._stats: list[StepStats] = []
        self._window_start = clock()

    def start_window(self) -> None:
        """Start the clock of tokens_per_second, after a report and all that followed from it (evaluation, saving)."""
        self._window_start = self._clock()

    def add(self, stats: StepStats) -> None:
        """Keep the statistics of a step on the device."""
        self._stats.append(stats)

    def report(self) -> tuple[dict[str, float], tuple[float, ...], tuple[bool, ...]]:
        """Return metrics, and for every step since the last report its loss and whether its update was skipped.

        Metrics are those of the last step, but for tokens_per_second and mfu, which are means over the window.
        """
        n_steps, last = len(self._stats), self._stats[-1]
        n_targets = torch.tensor([max(1, stats.n_targets) for stats in self._stats])
        sums = self._dist.sum(torch.stack([stats.loss_sum for stats in self._stats]))
        losses = sums / n_targets.to(sums.device, non_blocking=True)
        scalars = [stats.grad_norm for stats in self._stats] + [self._skipped_updates, *last.probes.values()]
        numbers = torch.cat([losses, torch.stack([scalar.to(losses.dtype) for scalar in scalars])])
        values: list[float] = numbers.tolist()  # the one host sync
        losses_on_host, grad_norms = values[:n_steps], values[n_steps : 2 * n_steps]
        skipped_updates, *probed = values[2 * n_steps :]

        tokens_per_second = n_steps * self._tokens_per_step / (self._clock() - self._window_start)
        metrics = {
            "train/loss": losses_on_host[-1],
            "grad_norm": grad_norms[-1],
            "tokens_per_second": tokens_per_second,
            # Model FLOPs utilization: Chowdhery et al. 2022, "PaLM", section 4.1.
            "mfu": self._flops_per_token * tokens_per_second / self._peak_flops,
        }
        if self._data_sheet_flops is not None:
            metrics["mfu_data_sheet"] = self._flops_per_token * tokens_per_second / self._data_sheet_flops
        if (peak_memory := self._peak_memory()) is not None:
            metrics["peak_memory_bytes"] = self._dist.max(peak_memory)
        if skipped_updates:
            metrics["skipped_updates"] = int(skipped_updates)
        metrics["lr"] = last.lr
        metrics |= zip(last.probes, probed, strict=True)
        self._stats.clear()
        return metrics, tuple(losses_on_host), tuple(not math.isfinite(norm) for norm in grad_norms)
