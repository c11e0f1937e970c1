"""AdamW by torch's fused kernel, without importing torch's compiler."""

import inspect
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch.optim.adamw import adamw

EPSILON = 1e-8

Group = dict[str, Any]


class AdamW(torch.optim.Optimizer):
    """Adam with decoupled weight decay (Loshchilov and Hutter 2019), by the fused kernel of cpu, cuda and mps.

    Bit-exact with `torch.optim.AdamW(fused=True)`, whose constructor imports torch's compiler: that takes a second, as
    long as the rest of torch.

    While the attribute `found_inf`, a scalar on the device, is set and 1, a step changes no parameter and no state.
    This is the protocol of torch's fused optimizers, and needs no host sync.

    Args:
        groups: parameter groups with `params` and `weight_decay`; `lr` is set before each step.
        betas: decay rates of the running means of the gradient and of its square.
    """

    _step_supports_amp_scaling = True
    """Makes GradScaler set `found_inf` instead of waiting for its value."""
    add_param_group = inspect.unwrap(torch.optim.Optimizer.add_param_group)
    state_dict = inspect.unwrap(torch.optim.Optimizer.state_dict)
    load_state_dict = inspect.unwrap(torch.optim.Optimizer.load_state_dict)
    zero_grad = inspect.unwrap(torch.optim.Optimizer.zero_grad)

    def __init__(self, groups: Iterable[Group], *, betas: tuple[float, float]):
        super().__init__(groups, {"lr": 0.0, "betas": betas, "fused": True})

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """Update every parameter that has a gradient."""
        assert closure is None, "closures are not supported"
        for group in self.param_groups:
            self._update(group)

    def _update(self, group: Group) -> None:
        params = [p for p in group["params"] if p.grad is not None]
        states = [self._state_of(p, "exp_avg", "exp_avg_sq") for p in params]
        for p, state in zip(params, states, strict=True):
            if "step" not in state:
                state["step"] = torch.zeros((), device=p.device)
        adamw(
            params,
            [p.grad for p in params],
            [state["exp_avg"] for state in states],
            [state["exp_avg_sq"] for state in states],
            [],
            [state["step"] for state in states],
            fused=True,
            amsgrad=False,
            beta1=group["betas"][0],
            beta2=group["betas"][1],
            lr=group["lr"],
            weight_decay=group["weight_decay"],
            eps=EPSILON,
            maximize=False,
            found_inf=self._found_inf,
        )

    @property
    def _found_inf(self) -> torch.Tensor | None:
        return getattr(self, "found_inf", None)

    def _state_of(self, p: torch.Tensor, *names: str) -> dict[str, torch.Tensor]:
        """Return the state of a parameter, in which missing names are filled with zeros of its shape."""
        state: dict[str, torch.Tensor] = self.state[p]
        for name in names:
            if name not in state:
                state[name] = torch.zeros_like(p)
        return state
