"""Sums in a fixed order, a balanced binary tree over neighbours, however the leaves are spread over ranks.

Floating-point addition is not associative, so the last bits of a sum depend on its order. If the number of leaves is a
power of two, equal blocks of neighbours are complete subtrees. Then each rank adds its own block, the ranks add their
results, and the sum is bit-exactly that of one rank that adds all leaves.
"""

from collections.abc import Sequence

import torch


def tree_sum(leaves: Sequence[torch.Tensor]) -> torch.Tensor:
    """Sum one or more tensors of one shape; an odd one is passed up a level.

    >>> int(tree_sum([torch.tensor(1), torch.tensor(2), torch.tensor(4)]))  # (1 + 2) + 4
    7
    """
    sums = list(leaves)
    while len(sums) > 1:
        odd = sums[len(sums) & ~1 :]
        sums = [left + right for left, right in zip(sums[0::2], sums[1::2], strict=False)] + odd
    return sums[0]


class TreeAccumulator:
    """Sum of leaves that come one after the other, in the order of `tree_sum`; their number is a power of two.

    Like a binary counter, it holds at most one subtree of each size: log2(leaves) + 1 lists at a time. A leaf is a list
    of tensors; all leaves have the same shapes.
    """

    def __init__(self) -> None:
        self._subtrees: dict[int, list[torch.Tensor]] = {}

    def add(self, leaf: list[torch.Tensor]) -> None:
        """Add the next leaf; its tensors belong to the accumulator from now on, which may overwrite them."""
        level = 0
        while (left := self._subtrees.pop(level, None)) is not None:
            torch._foreach_add_(left, leaf)
            leaf, level = left, level + 1
        self._subtrees[level] = leaf

    def take(self) -> list[torch.Tensor]:
        """Return the sums of all leaves since the last call, and start again."""
        ((level, sums),) = self._subtrees.items()  # one: their number is a power of two
        del self._subtrees[level]
        return sums
