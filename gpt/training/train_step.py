"""One optimizer step: forward, backward, clip, update. Its statistics stay on the device: no host sync."""

import math
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass

import torch
from torch import nn

from gpt.data.data_loader import MicroBatch, StepBatch
from gpt.parallel.gradient_sync import GradientSync
from gpt.utils.helper import Purpose, random_bits
from gpt.utils.tree_sum import tree_sum

ROUNDING = 1e-6
"""What torch adds to a norm that it divides by."""


@dataclass(frozen=True)
class StepStats:
    """Device scalars of one step."""

    loss_sum: torch.Tensor
    """Sum in nats over this process's tokens of the step."""
    grad_norm: torch.Tensor
    """Norm of the global gradient before clipping."""
    n_targets: int
    """Tokens that the step predicted, over all processes."""


class TrainStep:
    """Accumulate over micro-batches and update once.

    The loss is normalised by the number of tokens of the whole step, over all micro-batches and processes, so that
    cutting the step up in another way changes nothing but rounding.

    Args:
        model: the module to call: (tokens, targets, documents) -> summed loss; wrapped where there are several
            processes.
        optimizer: updates the model's parameters.
        scaler: of float16; disabled otherwise.
        skipped_updates: device counter, increased when a NaN or inf makes every process skip the update.
        autocast: context of the forward pass.
        gradients: adds them up over micro-batches and processes.
        grad_clip: largest norm of the gradient; 0 does not clip.
        seed: of the run.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        scaler: torch.amp.GradScaler,
        skipped_updates: torch.Tensor,
        *,
        autocast: Callable[[], AbstractContextManager[object]],
        gradients: GradientSync,
        grad_clip: float,
        seed: int,
    ):
        self._model, self._optimizer, self._scaler = model, optimizer, scaler
        self._skipped_updates = skipped_updates
        self._autocast = autocast
        self._gradients = gradients
        self._max_norm = grad_clip or math.inf
        self._seed = seed
        self._parameters = [p for group in optimizer.param_groups for p in group["params"]]

    def __call__(self, step: int, batch: StepBatch) -> StepStats:
        """Consume global batch `step` and update the parameters."""
        scale = self._gradients.loss_factor / max(1, batch.n_targets)  # the mean over the step's tokens
        last = batch.micro_batches[-1]
        losses = [self._accumulate(step, piece, scale, is_last=piece is last) for piece in batch.micro_batches]
        self._gradients.finish()
        self._scaler.unscale_(self._optimizer)
        grad_norm = clip(self._parameters, self._max_norm)
        is_finite = grad_norm.isfinite()
        if self._scaler.is_enabled():
            self._scaler.step(self._optimizer)
            self._scaler.update()
        else:
            update_if(is_finite, self._optimizer)
        self._skipped_updates += ~is_finite
        self._optimizer.zero_grad(set_to_none=True)
        return StepStats(tree_sum(losses), grad_norm, batch.n_targets)

    def _accumulate(self, step: int, batch: MicroBatch, scale: float, *, is_last: bool) -> torch.Tensor:
        # Every draw of this micro-batch is addressed, so neither the process count nor a restart can change it.
        torch.manual_seed(random_bits(self._seed, Purpose.FORWARD, step, batch.index))
        with self._gradients.micro_batch(is_last=is_last):
            with self._autocast():
                loss: torch.Tensor = self._model(batch.inputs, batch.targets, batch.documents)
            self._scaler.scale(loss * scale_or_nan(scale, loss)).backward()
        return loss.detach()


def clip(parameters: list[nn.Parameter], max_norm: float) -> torch.Tensor:
    """`torch.nn.utils.clip_grad_norm_`, to the bit; but a CPU, where the norm is known, does not multiply by one.

    Returns:
        The norm before clipping.
    """
    norm = torch.nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])
    if norm.device.type != "cpu" or norm + ROUNDING > max_norm:
        torch.nn.utils.clip_grads_with_norm_(parameters, max_norm, norm)
    return norm


def scale_or_nan(scale: float, loss: torch.Tensor) -> torch.Tensor:
    """`scale`, to the bit, where `loss` is finite, else NaN.

    A loss of inf may have a finite gradient. Scaled so its gradient is NaN, and so is every process's once gradients
    are averaged: the norm of the gradient tells all of them alike, and nothing else has to be exchanged.
    """
    return scale + 0 * loss.detach()


def update_if(is_finite: torch.Tensor, optimizer: torch.optim.Optimizer) -> None:
    """Update, or leave parameters and the optimizer's state as they are, in every bit.

    Args:
        is_finite: scalar bool on the device of the parameters; on CUDA nobody waits for it.
        optimizer: takes `found_inf` as those do that GradScaler hands it to.
    """
    if is_finite.device.type == "cuda":
        optimizer.found_inf = (~is_finite).float()  # type: ignore[attr-defined]
        optimizer.step()
        del optimizer.found_inf  # type: ignore[attr-defined]
    elif is_finite:
        optimizer.step()
