"""Flags that are being reduced over the ranks while training goes on."""

from typing import Any, Protocol

import torch


class PendingFlag(Protocol):
    """A flag that is being reduced over the ranks."""

    def read(self) -> int:
        """Return the largest value of any rank, after waiting for it."""
        ...


class KnownFlag:
    """The flag of the only rank."""

    def __init__(self, value: int):
        self._value = value

    def read(self) -> int:
        """Return the value."""
        return self._value


class ReducedFlag:
    """A flag that a collective is reducing.

    Args:
        flag: (1,) int64, holds the result once `work` is done.
        work: the collective.
    """

    def __init__(self, flag: torch.Tensor, work: Any):
        self._flag, self._work = flag, work

    def read(self) -> int:
        """Return the largest value of any rank, after waiting for it."""
        self._work.wait()
        return int(self._flag)
