"""Gradients that are bit-identical at every number of ranks.

The micro-batches of a step are the leaves of a binary tree, in the order of their index over all ranks. A rank has a
contiguous block of leaves and sums that subtree; then the ranks' sums are summed the same way. The tree, and with it
every rounding, is the same at every number of ranks.
"""

from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager

import torch

from gpt.utils.distributed import DistContext
from gpt.utils.tree_sum import TreeAccumulator


class TreeGradients:
    """Gradients summed in a fixed order; the model is bare, because DDP sums in another one.

    It holds log2(micro-batches of this rank) + 1 sets of gradients, and two more for the exchange.

    Args:
        parameters: the model's, all of one dtype.
        dist: the ranks, a power of two of them.
    """

    def __init__(self, parameters: Iterable[torch.nn.Parameter], dist: DistContext):
        self._parameters = [parameter for parameter in parameters if parameter.requires_grad]
        self._dist = dist
        self._tree = TreeAccumulator()
        n = sum(parameter.numel() for parameter in self._parameters)
        share = -(-n // dist.world_size)  # elements that each rank sums; the last rank's share is padded
        self._flat = self._parameters[0].new_zeros(share * dist.world_size)
        pieces = self._flat[:n].split([parameter.numel() for parameter in self._parameters])
        self._gradients = [piece.view_as(p) for piece, p in zip(pieces, self._parameters, strict=True)]

    @property
    def loss_factor(self) -> float:
        """One: the tree computes a sum."""
        return 1.0

    def micro_batch(self, *, is_last: bool) -> AbstractContextManager[object]:
        """Return a context after which the micro-batch's gradients are the next leaf."""
        return self._add_leaf()

    @contextmanager
    def _add_leaf(self) -> Iterator[None]:
        yield
        leaf = []
        for parameter in self._parameters:
            assert parameter.grad is not None, "every parameter takes part in every micro-batch"
            leaf.append(parameter.grad)
            parameter.grad = None  # the next backward pass must allocate new gradients, not add to these
        self._tree.add(leaf)

    def finish(self) -> None:
        """Sum over the ranks; the gradients become views of one buffer, the same at every number of ranks."""
        torch._foreach_copy_(self._gradients, self._tree.take())
        self._dist.tree_sum_(self._flat)
        for parameter, gradient in zip(self._parameters, self._gradients, strict=True):
            parameter.grad = gradient
