"""The step's gradient with the same bits at every number of processes.

The micro-batches of a step are the leaves of a binary tree, in the order of their index over all processes. A process
has a block of neighbours and adds up that subtree; then the processes' sums are added up in the same way. What the
sum depends on is the tree, which is the same however many processes share it.
"""

from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager

import torch

from gpt.utils.distributed import DistContext
from gpt.utils.tree_sum import TreeAccumulator


class TreeGradients:
    """Gradients added in a fixed order; the model is bare, for DDP adds in another one.

    Holds log2(micro-batches of this process) + 1 sets of gradients, and two more to exchange them.

    Args:
        parameters: of the model, all of them of one type.
        dist: the processes, a power of two of them.
    """

    def __init__(self, parameters: Iterable[torch.nn.Parameter], dist: DistContext):
        self._parameters = [parameter for parameter in parameters if parameter.requires_grad]
        self._dist = dist
        self._tree = TreeAccumulator()
        n = sum(parameter.numel() for parameter in self._parameters)
        share = -(-n // dist.world_size)  # what each process adds up; the last one's is padded
        self._flat = self._parameters[0].new_zeros(share * dist.world_size)
        pieces = self._flat[:n].split([parameter.numel() for parameter in self._parameters])
        self._gradients = [piece.view_as(p) for piece, p in zip(pieces, self._parameters, strict=True)]

    @property
    def loss_factor(self) -> float:
        """The tree is a sum already."""
        return 1.0

    def micro_batch(self, *, is_last: bool) -> AbstractContextManager[object]:
        """Make the gradients of one micro-batch the next leaf."""
        return self._leaf()

    @contextmanager
    def _leaf(self) -> Iterator[None]:
        yield
        leaf = []
        for parameter in self._parameters:
            assert parameter.grad is not None, "every parameter takes part in every micro-batch"
            leaf.append(parameter.grad)
            parameter.grad = None  # so that the next backward pass makes new ones, and adds nothing to these
        self._tree.add(leaf)

    def finish(self) -> None:
        """Add up over the processes; the gradients lie in one buffer, the same one at every number of them."""
        torch._foreach_copy_(self._gradients, self._tree.take())
        self._dist.tree_sum_(self._flat)
        for parameter, gradient in zip(self._parameters, self._gradients, strict=True):
            parameter.grad = gradient
