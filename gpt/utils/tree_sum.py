"""Sums in a fixed order: a balanced binary tree over neighbours, whoever adds which part of it.

Floating-point addition is not associative, so a sum's last bits tell in which order it was made. Of a power of two of
leaves, equal blocks of neighbours are whole subtrees: a process may add its own block and the processes their
results, and the bits are those of one process that adds all of them.
"""

from collections.abc import Sequence

import torch


def tree_sum(leaves: Sequence[torch.Tensor]) -> torch.Tensor:
    """Sum of one or more tensors of a shape; an odd one out is passed up a level."""
    sums = list(leaves)
    while len(sums) > 1:
        odd = sums[len(sums) & ~1 :]
        sums = [left + right for left, right in zip(sums[0::2], sums[1::2], strict=False)] + odd
    return sums[0]


class TreeAccumulator:
    """The tree of `tree_sum` over a power of two of leaves that come one after the other.

    It works as a binary counter does and holds at most one subtree of each size, log2(leaves) + 1 lists at a time. A
    leaf is a list of tensors, always of the same shapes.
    """

    def __init__(self) -> None:
        self._subtrees: dict[int, list[torch.Tensor]] = {}

    def add(self, leaf: list[torch.Tensor]) -> None:
        """Add the next leaf; its tensors are ours from now on, and may be written to."""
        level = 0
        while (left := self._subtrees.pop(level, None)) is not None:
            torch._foreach_add_(left, leaf)
            leaf, level = left, level + 1
        self._subtrees[level] = leaf

    def take(self) -> list[torch.Tensor]:
        """The sums of all leaves since the last time."""
        ((level, sums),) = self._subtrees.items()  # one: their number is a power of two
        del self._subtrees[level]
        return sums
