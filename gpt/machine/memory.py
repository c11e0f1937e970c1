"""Peak memory of a computation, and the largest size of it that fits into memory."""

import weakref
from bisect import bisect_left
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter


class LiveMemory(TorchDispatchMode):
    """Counter of the bytes of live tensors that were created while it is active.

    Unlike the process's size, the count is exact and equal in every run, and does not include memory that an allocator
    holds back. It does not see temporary memory inside an operation.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.now: int = 0
        self.peak: int = 0
        self._tracked: dict[int, weakref.ref[torch.UntypedStorage]] = {}

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        for tensor in _tensors((args, kwargs)):  # tensors from before, and their views, cost nothing
            self._track(tensor.untyped_storage(), 0)
        out = function(*args, **(kwargs or {}))
        for tensor in _tensors(out):
            self._track(tensor.untyped_storage(), tensor.untyped_storage().nbytes())
        self.peak = max(self.peak, self.now)
        return out

    def _track(self, storage: torch.UntypedStorage, size: int) -> None:
        key = storage._cdata
        if key in self._tracked:
            return

        def forget(_: object) -> None:
            del self._tracked[key]
            self.now -= size

        self._tracked[key] = weakref.ref(storage, forget)
        self.now += size


def extrapolate_max_size(attempt: Callable[[int], None], sizes: Sequence[int], room: int) -> int:
    """Return the largest size whose tensors fit into `room`, extrapolated from the peaks of sizes 1 and 2.

    For devices where running out of memory ends the process.

    Args:
        attempt: computation that takes its size.
        sizes: sizes to choose from, ascending.
        room: memory in bytes.

    Returns:
        One of `sizes`; 0 if none fits.
    """
    attempt(1)  # allocates what is allocated once, so that it does not count: gradients, buffers of libraries
    peak_1 = _measure_peak(attempt, 1)
    if peak_1 > room:
        return 0
    peak_2 = _measure_peak(attempt, 2)
    return max((size for size in sizes if peak_1 + (size - 1) * (peak_2 - peak_1) <= room), default=0)


def search_max_size(
    attempt: Callable[[int], None], sizes: Sequence[int], *, reserved: int, device: torch.device
) -> int:
    """Return the largest size at which `attempt` does not run out of a GPU's memory, by binary search.

    Args:
        attempt: computation that takes its size.
        sizes: sizes to choose from, ascending.
        reserved: bytes that must stay free for something else.
        device: the GPU.

    Returns:
        One of `sizes`; 0 if none fits.
    """

    def fails(size: int) -> bool:
        try:
            reserve = torch.empty(reserved, dtype=torch.uint8, device=device)
            attempt(size)
            del reserve
        except torch.OutOfMemoryError:
            return True
        finally:
            if device.type == "cuda":
                torch.cuda.empty_cache()  # blocks that are cached for one size would be in the way of the next
        return False

    n_fitting: int = bisect_left(sizes, True, key=fails)
    return sizes[n_fitting - 1] if n_fitting > 0 else 0


def _measure_peak(attempt: Callable[[int], None], size: int) -> int:
    memory = LiveMemory()
    with memory:
        attempt(size)
    return memory.peak


def _tensors(tree: Any) -> list[torch.Tensor]:
    return [leaf for leaf in tree_iter(tree) if isinstance(leaf, torch.Tensor)]
