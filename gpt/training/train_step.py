"""One training step: fetch the batch, set the learning rate, forward, backward, clip, update.

Its statistics stay on the device: no host sync.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field

import torch
from torch import nn

from gpt.checkpoint.app_state import AppState
from gpt.configs.run_plan import RunPlan
from gpt.data.data_loader import DataLoader, MicroBatch
from gpt.optim.build import set_learning_rate
from gpt.parallel.gradient_sync import GradientSync
from gpt.training.observer import Probe
from gpt.training.step_timer import StepTimer
from gpt.utils.custom_scheduler import Schedule
from gpt.utils.helper import Purpose, random_bits
from gpt.utils.tree_sum import tree_sum

NORM_EPSILON = 1e-6
"""Number that torch adds to a norm before dividing by it."""


@dataclass(frozen=True)
class StepStats:
    """Statistics of one step; tensors are device scalars."""

    loss_sum: torch.Tensor
    """Sum in nats over this rank's tokens of the step."""
    grad_norm: torch.Tensor
    """Norm of the global gradient before clipping."""
    n_targets: int
    """Tokens that the step predicted, over all ranks."""
    lr: float
    """Learning rate of the update: `lr.max_lr` times the lr multiplier."""
    probes: Mapping[str, torch.Tensor] = field(default_factory=dict)
    """Metric -> scalar that a probe measured."""


class TrainStep:
    """Consumes one global batch: accumulates over its micro-batches and updates the parameters once.

    The loss is normalised by the number of tokens of the whole step, over all micro-batches and ranks, so that another
    micro-batch size or number of ranks changes nothing but rounding.

    Args:
        model: the parallelized module: (tokens, targets, documents) -> summed loss.
        state: model, optimizer and scaler to update, and the device counter of skipped updates.
        plan: gives the seed and the highest learning rate.
        loader: maps a step to this rank's batch; closed with the step.
        schedule: maps a step to the lr multiplier of its update.
        autocast: context of a forward pass.
        gradients: sums gradients over micro-batches and ranks.
        grad_clip: largest norm of the gradient; 0 does not clip.
        timer: measures the phases.
    """

    def __init__(
        self,
        model: nn.Module,
        state: AppState,
        plan: RunPlan,
        *,
        loader: DataLoader,
        schedule: Schedule,
        autocast: Callable[[], AbstractContextManager[object]],
        gradients: GradientSync,
        grad_clip: float,
        timer: StepTimer,
    ):
        self._model, self._plan = model, plan
        self._optimizer, self._scaler, self._skipped_updates = state.optimizer, state.scaler, state.skipped_updates
        self._loader, self._schedule = loader, schedule
        self._autocast, self._gradients, self._timer = autocast, gradients, timer
        self._max_norm = grad_clip or math.inf
        self._parameters = [p for group in state.optimizer.param_groups for p in group["params"]]
        self._named_parameters = dict(state.model.named_parameters())

    def __call__(self, step: int, probes: Sequence[Probe] = ()) -> StepStats:
        """Train on global batch `step`.

        Args:
            step: global batches consumed so far.
            probes: measure the gradient and the parameters before the update.
        """
        # Batch and learning rate.
        with self._timer.phase("data"):
            batch = self._loader.get_batch(step)
        lr_multiplier = self._schedule(step)
        set_learning_rate(self._optimizer, lr_multiplier)

        # Forward and backward over the micro-batches.
        scale = self._gradients.loss_factor / max(1, batch.n_targets)  # the mean over the step's tokens
        last = batch.micro_batches[-1]
        losses = [self._accumulate(step, micro, scale, is_last=micro is last) for micro in batch.micro_batches]
        with self._timer.phase("backward"):
            self._gradients.finish()

        # Clip and update.
        with self._timer.phase("optimizer"):
            self._scaler.unscale_(self._optimizer)
            measured = self._measure(probes)
            grad_norm = clip_gradients(self._parameters, self._max_norm)
            self._update(grad_norm.isfinite())
        lr = self._plan.lr.max_lr * lr_multiplier
        return StepStats(tree_sum(losses), grad_norm, batch.n_targets, lr, measured)

    def close(self) -> None:
        """End the loader's thread."""
        self._loader.close()

    def _accumulate(self, step: int, batch: MicroBatch, scale: float, *, is_last: bool) -> torch.Tensor:
        # Dropout's random bits are folded from the micro-batch's address: neither the world size nor a restart
        # changes them.
        torch.manual_seed(random_bits(self._plan.seed, Purpose.FORWARD, step, batch.index))
        with self._gradients.micro_batch(is_last=is_last):
            with self._timer.phase("forward"), self._autocast():
                loss: torch.Tensor = self._model(batch.inputs, batch.targets, batch.documents)
            with self._timer.phase("backward"):
                self._scaler.scale(loss * scale_or_nan(scale, loss)).backward()
        return loss.detach()

    @torch.no_grad()
    def _measure(self, probes: Sequence[Probe]) -> Mapping[str, torch.Tensor]:
        measured: dict[str, torch.Tensor] = {}
        for probe in probes:
            measured |= probe.measure(self._named_parameters)
        return measured

    def _update(self, is_finite: torch.Tensor) -> None:
        """Update the parameters, unless the gradient is not finite, and clear the gradients."""
        update_if(is_finite, self._optimizer)  # not scaler.step, which does not see a norm that overflows
        self._scaler.update()
        self._skipped_updates += ~is_finite
        self._optimizer.zero_grad(set_to_none=True)


def clip_gradients(parameters: list[nn.Parameter], max_norm: float) -> torch.Tensor:
    """Clip like `torch.nn.utils.clip_grad_norm_`, bit-exactly; a CPU, which knows the norm, skips multiplying by one.

    Returns:
        The norm before clipping.
    """
    norm = torch.nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])
    if norm.device.type != "cpu" or norm + NORM_EPSILON > max_norm:
        torch.nn.utils.clip_grads_with_norm_(parameters, max_norm, norm)
    return norm


def scale_or_nan(scale: float, loss: torch.Tensor) -> torch.Tensor:
    """Return `scale`, bit-exactly, if `loss` is finite, else NaN.

    A loss of inf may have a finite gradient. Scaled by this its gradient is NaN, and so is that of every rank once
    gradients are averaged: all ranks see it in the gradient's norm, and need no other collective.
    """
    return scale + 0 * loss.detach()


def update_if(is_finite: torch.Tensor, optimizer: torch.optim.Optimizer) -> None:
    """Update, or leave every bit of the parameters and of the optimizer's state as it is.

    Args:
        is_finite: scalar bool on the parameters' device; on CUDA the host does not read it.
        optimizer: one that supports `found_inf`, as GradScaler sets it.
    """
    if is_finite.device.type == "cuda":
        optimizer.found_inf = (~is_finite).float()  # type: ignore[attr-defined]
        optimizer.step()
        del optimizer.found_inf  # type: ignore[attr-defined]
    elif is_finite:
        optimizer.step()
