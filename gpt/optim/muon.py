"""Muon for the hidden matrices and AdamW for everything else, as one optimizer."""

import math
from collections import defaultdict
from collections.abc import Callable

import torch

from gpt.optim.adamw import AdamW, Group

QUINTIC = (3.4445, -4.7750, 2.0315)
"""Coefficients that grow small singular values fastest; all end between 0.7 and 1.2, not at 1 (Jordan et al. 2024)."""
NEWTON_SCHULZ_STEPS = 5
EPSILON = 1e-7


class Muon(AdamW):
    """Orthogonalised momentum (Jordan et al. 2024, "Muon: an optimizer for hidden layers in neural networks").

    The update of a matrix is its momentum with all singular values brought to about 1, so that every direction is
    learned equally fast. The update of an A x B matrix is scaled by sqrt(max(1, A / B)), and weight decay is decoupled,
    as in the authors' code and in `torch.optim.Muon`, with which the tests compare. Unlike these it orthogonalises all
    matrices of one shape in one batch, and matrices that are fused in one parameter separately: in queries, keys and
    values together, the one with the largest gradient would leave little to the others. Every rank computes the same
    update from the same averaged gradient, so there is nothing to communicate.

    Args:
        matrices: group with `params`, `weight_decay`, `momentum` and `parts`, the rows of the matrices that are fused
            in each parameter.
        others: groups for AdamW, with `params` and `weight_decay`.
        betas: decay rates of AdamW.
        precision: dtype in which matrices are orthogonalised; bfloat16 is enough, its rounding is noise.
    """

    def __init__(self, matrices: Group, others: list[Group], *, betas: tuple[float, float], precision: torch.dtype):
        super().__init__([matrices, *others], betas=betas)
        self._precision = precision

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """Update every parameter that has a gradient."""
        assert closure is None, "closures are not supported"
        matrices, *others = self.param_groups
        self._update_matrices(matrices)
        for group in others:
            self._update(group)

    def _update_matrices(self, group: Group) -> None:
        by_shape: dict[torch.Size, list[tuple[torch.Tensor, ...]]] = defaultdict(list)
        for p, parts in zip(group["params"], group["parts"], strict=True):
            if p.grad is not None:
                momentum = self._state_of(p, "momentum_buffer")["momentum_buffer"]
                for views in zip(p.split(parts), p.grad.split(parts), momentum.split(parts), strict=True):
                    by_shape[views[0].shape].append(views)
        for (rows, columns), tensors in by_shape.items():
            weights, grads, momenta = map(list, zip(*tensors, strict=True))
            next_momenta = torch._foreach_lerp(momenta, grads, 1 - group["momentum"])
            nesterov = torch._foreach_lerp(grads, next_momenta, group["momentum"])
            updates = orthogonalize(torch.stack(nesterov).to(self._precision)).float()  # (N, rows, columns)
            decay_factor: float | torch.Tensor = 1 - group["lr"] * group["weight_decay"]
            if self._found_inf is not None:
                skips = self._found_inf.bool()
                next_momenta = tuple(torch.where(skips, *pair) for pair in zip(momenta, next_momenta, strict=True))
                updates = torch.where(skips, 0.0, updates)
                decay_factor = torch.where(skips, 1.0, decay_factor)
            torch._foreach_copy_(momenta, next_momenta)
            torch._foreach_mul_(weights, decay_factor)
            torch._foreach_add_(weights, updates.unbind(), alpha=-group["lr"] * math.sqrt(max(1, rows / columns)))


def orthogonalize(matrices: torch.Tensor) -> torch.Tensor:
    """Bring every singular value of every matrix near 1, by Newton-Schulz iterations; (N, A, B) -> (N, A, B).

    An odd polynomial of a matrix applies that polynomial to its singular values: matmuls replace a decomposition.
    """
    a, b, c = QUINTIC
    tall = matrices.shape[-2] > matrices.shape[-1]
    x = matrices.mT if tall else matrices  # makes x x^T the smaller of the two squares
    x = x / x.norm(dim=(-2, -1), keepdim=True).clamp(min=EPSILON)  # no singular value above 1
    for _ in range(NEWTON_SCHULZ_STEPS):
        square = x @ x.mT  # (N, A, A)
        polynomial = torch.baddbmm(square, square, square, beta=b, alpha=c)
        x = torch.baddbmm(x, polynomial, x, beta=a)
    return x.mT if tall else x
