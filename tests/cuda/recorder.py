"""Records what a computation on the CUDA device does: host syncs, copies, launches."""

import traceback
from collections import Counter
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

SYNCS = frozenset(
    {"_local_scalar_dense", "nonzero", "masked_select", "equal", "is_nonzero", "_unique2", "unique_dim", "bincount"}
)
"""Ops for which the host waits, because the result or its shape depends on data."""
COPIES = frozenset({"_to_copy", "copy_"})
WITHOUT_KERNEL = frozenset(
    {
        *("_record_function_enter_new", "_record_function_exit", "device", "dim", "size", "stride", "sym_size"),
        *("sym_stride", "is_contiguous", "storage_offset", "layout", "view", "t", "transpose", "expand"),
        *("_unsafe_view", "detach", "slice", "split", "unbind", "permute", "select", "unsqueeze", "squeeze", "alias"),
        *("as_strided", "split_with_sizes", "lift_fresh", "empty", "new_empty", "empty_like", "empty_strided"),
        *("_reshape_alias", "chunk"),
    }
)
"""Ops that launch nothing: views, and allocations that fill nothing."""


class Recorder(TorchDispatchMode):
    """Records every op while it is active."""

    supports_higher_order_operators = True

    def __init__(self) -> None:
        super().__init__()
        self.syncs: list[str] = []
        self.copies: list[str] = []
        self.mixed: list[str] = []
        self.launches: Counter[str] = Counter()

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        is_plain = isinstance(function, torch._ops.OpOverload)
        may_decompose = is_plain and function.namespace == "aten"
        if may_decompose and torch.is_inference_mode_enabled():  # where composite ops arrive before they are decomposed
            with self:
                out = function.decompose(*args, **(kwargs or {}))
            if out is not NotImplemented:
                return out
        name = function.overloadpacket.__name__ if is_plain else function.name()
        if name in SYNCS:
            self.syncs.append(f"{name} at {_find_caller()}")
        out = function(*args, **(kwargs or {}))
        tensors = [leaf for leaf in tree_iter((args, kwargs, out)) if isinstance(leaf, torch.Tensor)]
        devices = {tensor.device.type for tensor in tensors}
        if len(devices) > 1:
            # A scalar on the CPU is an argument of the launch, not a copy.
            is_scalar = name not in COPIES and all(x.dim() == 0 for x in tensors if x.device.type == "cpu")
            if not is_scalar:
                (self.copies if name in COPIES else self.mixed).append(f"{name} at {_find_caller()}")
        if "cuda" in devices and name not in WITHOUT_KERNEL:
            self.launches[name] += 1
        return out

    def to_json(self) -> dict[str, Any]:
        """Return the record as JSON."""
        return {
            "syncs": self.syncs,
            "copies": self.copies,
            "mixed": self.mixed,
            "launches": sum(self.launches.values()),
            "launches_by_op": dict(self.launches.most_common()),
        }


def _find_caller() -> str:
    frames = [frame for frame in traceback.extract_stack() if "/gpt/" in frame.filename]
    return " < ".join(f"{frame.filename.rpartition('/gpt/')[2]}:{frame.lineno}" for frame in reversed(frames[-2:]))
