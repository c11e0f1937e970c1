"""The complete state of a run. Everything else is a function of the configuration and the step."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import nn

from gpt.errors import UserError

Tensors = dict[str, torch.Tensor]


@dataclass(frozen=True)
class Progress:
    """Position of a run."""

    step: int = 0
    """Global batches consumed."""
    tokens: int = 0
    """Tokens consumed."""

    def advance(self, tokens: int) -> "Progress":
        """Return the progress after one more global batch of `tokens` tokens."""
        return Progress(self.step + 1, self.tokens + tokens)


class Savable(Protocol):
    """An observer with a state of its own, which checkpoints hold."""

    def state_json(self) -> dict[str, Any]:
        """Return the state as JSON."""
        ...

    def load_json(self, saved: dict[str, Any]) -> None:
        """Restore a state that `state_json` returned."""
        ...


class AppState:
    """The state that a checkpoint holds.

    Args:
        model: the bare module, never a wrapper, so that parameters have their canonical names.
        optimizer: its state is saved under the parameters' names.
        scaler: gradient scaler of float16; disabled for other dtypes.
        skipped_updates: counter on the device, of the steps whose update was skipped for a non-finite gradient.
        identity: values that a run must share with this one to resume it; saved with the progress.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        scaler: torch.amp.GradScaler,
        skipped_updates: torch.Tensor,
        identity: Mapping[str, str | int],
    ):
        self.model = model
        self.optimizer = optimizer
        self.scaler = scaler
        self.skipped_updates = skipped_updates
        self.identity = dict(identity)
        self.progress = Progress()
        self.savables: dict[str, Savable] = {}
        """Observers with a state of their own, by name; add all of them before `load`."""

    def model_tensors(self) -> Tensors:
        """Return parameters and buffers by name."""
        return dict(self.model.state_dict())

    def optimizer_tensors(self) -> Tensors:
        """Return the optimizer's state as `PARAMETER.KEY` -> tensor; AdamW's keys are exp_avg, exp_avg_sq and step."""
        return {
            f"{name}.{key}": value
            for name, parameter in self.model.named_parameters()
            for key, value in self.optimizer.state.get(parameter, {}).items()
        }

    def progress_json(self) -> dict[str, Any]:
        """Return the rest of the state as JSON."""
        return {
            "step": self.progress.step,
            "tokens": self.progress.tokens,
            "skipped_updates": int(self.skipped_updates),
            "scaler": self.scaler.state_dict(),
            "identity": self.identity,
            "observers": {name: savable.state_json() for name, savable in self.savables.items()},
        }

    def load(self, model: Tensors, optimizer: Tensors, progress: dict[str, Any]) -> None:
        """Restore a state that the three methods above returned.

        Raises:
            UserError: the state belongs to another architecture, or the progress is damaged.
        """
        _require_valid_progress(progress)
        load_model_tensors(self.model, model)
        self._require_optimizer_shapes(optimizer)
        names = {parameter: name for name, parameter in self.model.named_parameters()}
        by_parameter: dict[str, Tensors] = {}
        for name, value in optimizer.items():
            parameter_name, _, key = name.rpartition(".")
            by_parameter.setdefault(parameter_name, {})[key] = value
        template = self.optimizer.state_dict()
        parameters = [parameter for group in self.optimizer.param_groups for parameter in group["params"]]
        template["state"] = {
            index: by_parameter[names[parameter]]
            for index, parameter in enumerate(parameters)
            if names[parameter] in by_parameter
        }
        self.optimizer.load_state_dict(template)
        if progress["scaler"]:  # empty if it was disabled: the run was saved with another dtype
            self.scaler.load_state_dict(progress["scaler"])
        self.skipped_updates.fill_(progress["skipped_updates"])
        self.progress = Progress(progress["step"], progress["tokens"])
        observers = progress.get("observers", {})
        for name in self.savables.keys() & observers.keys():
            self.savables[name].load_json(observers[name])

    def _require_optimizer_shapes(self, optimizer: Tensors) -> None:
        shapes = {name: parameter.shape for name, parameter in self.model.named_parameters()}
        for name, value in optimizer.items():
            parameter_name, _, _ = name.rpartition(".")
            if value.shape not in (shapes.get(parameter_name), torch.Size()):
                expected = tuple(shapes.get(parameter_name, ())) or "none"
                raise UserError(
                    f"the checkpoint has another optimizer: {name} has shape {tuple(value.shape)} in the checkpoint "
                    f"and {expected} in this model; use the checkpoint's config.json"
                )


def _require_valid_progress(progress: dict[str, Any]) -> None:
    for name in ("step", "tokens", "skipped_updates"):
        value = progress.get(name)
        if type(value) is not int or not 0 <= value < 2**63:
            raise UserError(f"the checkpoint's progress is damaged: {name} is {value!r:.40}; delete the checkpoint")


def load_model_tensors(model: nn.Module, tensors: Tensors) -> None:
    """Copy parameters and buffers into a model.

    Raises:
        UserError: they belong to another architecture.
    """
    expected = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    found = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    for name in sorted(expected.keys() | found.keys()):
        if expected.get(name) != found.get(name):
            raise UserError(
                f"the checkpoint has another architecture: {name} has shape {found.get(name, 'none')} in the "
                f"checkpoint and {expected.get(name, 'none')} in this model; use the checkpoint's config.json"
            )
    model.load_state_dict(tensors)
