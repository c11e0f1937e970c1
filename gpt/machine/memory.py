"""How much memory a computation needs, and how large it may be to fit."""

import weakref
from bisect import bisect_left
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter


class LiveMemory(TorchDispatchMode):
    """Counts the bytes of tensors that are made while it is active, and still exist.

    Unlike the process's size it is exact, the same at every run, and knows nothing of what an allocator keeps. What an
    operation needs inside itself is not seen.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.now: int = 0
        self.peak: int = 0
        self._known: dict[int, weakref.ref[torch.UntypedStorage]] = {}

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        for tensor in _tensors((args, kwargs)):  # what was there before, and its views, cost nothing
            self._know(tensor.untyped_storage(), 0)
        out = function(*args, **(kwargs or {}))
        for tensor in _tensors(out):
            self._know(tensor.untyped_storage(), tensor.untyped_storage().nbytes())
        self.peak = max(self.peak, self.now)
        return out

    def _know(self, storage: torch.UntypedStorage, size: int) -> None:
        key = storage._cdata
        if key in self._known:
            return

        def forget(_: object) -> None:
            del self._known[key]
            self.now -= size

        self._known[key] = weakref.ref(storage, forget)
        self.now += size


def max_size_by_measure(attempt: Callable[[int], None], sizes: Sequence[int], room: int) -> int:
    """The largest size whose tensors fit into `room`, extrapolated from sizes 1 and 2.

    For devices where an attempt that needs too much ends the process.

    Args:
        attempt: does what is to fit, at a size.
        sizes: ascending.
        room: bytes.

    Returns:
        One of `sizes`, or 0 where none fits.
    """
    attempt(1)  # so that what is made once is not counted: gradients, and what libraries keep
    one = _peak(attempt, 1)
    if one > room:
        return 0
    two = _peak(attempt, 2)
    return max((size for size in sizes if one + (size - 1) * (two - one) <= room), default=0)


def max_size_by_trial(
    attempt: Callable[[int], None], sizes: Sequence[int], *, reserved: int, device: torch.device
) -> int:
    """The largest size at which `attempt` does not run out of a GPU's memory.

    Args:
        attempt: does what is to fit, at a size.
        sizes: ascending.
        reserved: bytes that must stay free for something else.
        device: whose memory it is.

    Returns:
        One of `sizes`, or 0 where none fits.
    """

    def fails(size: int) -> bool:
        try:
            held = torch.empty(reserved, dtype=torch.uint8, device=device)
            attempt(size)
            del held
        except torch.OutOfMemoryError:
            return True
        finally:
            if device.type == "cuda":
                torch.cuda.empty_cache()  # or what one size was cut into would be in the way of the next
        return False

    fitting: int = bisect_left(sizes, True, key=fails)
    return sizes[fitting - 1] if fitting > 0 else 0


def _peak(attempt: Callable[[int], None], size: int) -> int:
    memory = LiveMemory()
    with memory:
        attempt(size)
    return memory.peak


def _tensors(tree: Any) -> list[torch.Tensor]:
    return [leaf for leaf in tree_iter(tree) if isinstance(leaf, torch.Tensor)]
