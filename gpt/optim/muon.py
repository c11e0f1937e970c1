"""Muon for the matrices of hidden layers, AdamW for everything else, as one optimizer."""

import math
from collections import defaultdict
from collections.abc import Callable
from typing import Any

import torch
from torch.optim.adamw import adamw

QUINTIC = (3.4445, -4.7750, 2.0315)
"""Coefficients that grow small singular values fastest; they end between 0.7 and 1.2, not at 1 (Jordan et al. 2024)."""
ITERATIONS = 5
EPSILON = 1e-7

Group = dict[str, Any]


class Muon(torch.optim.Optimizer):
    """Momentum, orthogonalised (Jordan et al. 2024, "Muon: an optimizer for hidden layers in neural networks").

    A matrix's update is the nearest one whose singular values are all about 1, so that every direction is learnt at the
    same rate. The update of a matrix of A x B is scaled by sqrt(max(1, A / B)), and weight decay is decoupled: as in
    the authors' code and in `torch.optim.Muon`, with which the tests compare. Unlike these it orthogonalises all
    matrices of a shape at once, and fused ones each by itself: of queries, keys and values in one, those with the
    largest gradient would leave the others little. Every process computes the same from the same averaged gradient:
    there is nothing to exchange.

    While an attribute `found_inf` is set, a scalar on the device, and it is 1, a step changes no bit of parameters and
    state: as in torch's fused optimizers, so that nobody has to wait for the device to know.

    Args:
        matrices: a group with `params`, `weight_decay`, `momentum` and `parts`: of each parameter the rows of the
            matrices that are fused in it.
        others: groups for AdamW, with `params` and `weight_decay`.
        betas: of AdamW.
        precision: type in which matrices are orthogonalised; bfloat16 serves, for what is lost is noise.
    """

    _step_supports_amp_scaling = True
    """Tells GradScaler to hand `found_inf` over instead of waiting for it."""

    def __init__(self, matrices: Group, others: list[Group], *, betas: tuple[float, float], precision: torch.dtype):
        super().__init__([matrices, *others], {"lr": 0.0, "betas": betas})
        self._precision = precision

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """Update every parameter that has a gradient."""
        assert closure is None, "no part of this program has one"
        matrices, *others = self.param_groups
        self._update_matrices(matrices)
        for group in others:
            self._update_by_adamw(group)

    def _update_matrices(self, group: Group) -> None:
        by_shape: dict[torch.Size, list[tuple[torch.Tensor, ...]]] = defaultdict(list)
        for p, parts in zip(group["params"], group["parts"], strict=True):
            if p.grad is not None:
                momentum = self._state(p, "momentum_buffer")["momentum_buffer"]
                for views in zip(p.split(parts), p.grad.split(parts), momentum.split(parts), strict=True):
                    by_shape[views[0].shape].append(views)
        for (rows, columns), same in by_shape.items():
            weights, grads, momenta = (list(tensors) for tensors in zip(*same, strict=True))
            next_momenta = torch._foreach_lerp(momenta, grads, 1 - group["momentum"])
            ahead = torch._foreach_lerp(grads, next_momenta, group["momentum"])  # Nesterov's
            updates = orthogonalize(torch.stack(ahead).to(self._precision)).float()  # (N, rows, columns)
            kept: float | torch.Tensor = 1 - group["lr"] * group["weight_decay"]
            if self._found_inf is not None:
                skips = self._found_inf.bool()
                next_momenta = tuple(torch.where(skips, *pair) for pair in zip(momenta, next_momenta, strict=True))
                updates = torch.where(skips, 0.0, updates)
                kept = torch.where(skips, 1.0, kept)
            torch._foreach_copy_(momenta, next_momenta)
            torch._foreach_mul_(weights, kept)
            torch._foreach_add_(weights, updates.unbind(), alpha=-group["lr"] * math.sqrt(max(1, rows / columns)))

    def _update_by_adamw(self, group: Group) -> None:
        params = [p for p in group["params"] if p.grad is not None]
        states = [self._state(p, "exp_avg", "exp_avg_sq") for p in params]
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
            eps=1e-8,
            maximize=False,
            found_inf=self._found_inf,
        )

    @property
    def _found_inf(self) -> torch.Tensor | None:
        return getattr(self, "found_inf", None)

    def _state(self, p: torch.Tensor, *names: str) -> dict[str, torch.Tensor]:
        """The state of a parameter, with zeros of its shape for each name that is not there yet."""
        state: dict[str, torch.Tensor] = self.state[p]
        for name in names:
            if name not in state:
                state[name] = torch.zeros_like(p)
        return state


def orthogonalize(matrices: torch.Tensor) -> torch.Tensor:
    """(N, A, B) -> (N, A, B): every singular value of every matrix brought near 1, by Newton-Schulz iterations.

    An odd polynomial of a matrix is that polynomial of its singular values, so products of matrices do what would take
    a decomposition.
    """
    a, b, c = QUINTIC
    tall = matrices.shape[-2] > matrices.shape[-1]
    x = matrices.mT if tall else matrices  # so that x x^T is the smaller of the two squares
    x = x / x.norm(dim=(-2, -1), keepdim=True).clamp(min=EPSILON)  # no singular value above 1
    for _ in range(ITERATIONS):
        square = x @ x.mT  # (N, A, A)
        polynomial = torch.baddbmm(square, square, square, beta=b, alpha=c)
        x = torch.baddbmm(x, polynomial, x, beta=a)
    return x.mT if tall else x
