"""The one place that says which dtype computes what; nothing else asks for autocast's global state.

Under autocast, parameters and the residual stream are float32. Matmuls, attention and activations take the compute
dtype (bfloat16 or float16); norms, rotary embeddings, softmax, the loss and every gradient of a parameter are float32.
Without autocast everything has the dtype of its inputs. `round_output` gives the residual stream the compute dtype, too
(--residual-dtype compute). Autocast itself stays the mechanism, so that modules that a
user puts into the model compute in the same dtype (docs/adr/0017-autocast-is-asked-in-one-place.md).
"""

from collections.abc import Callable
from contextlib import AbstractContextManager
from functools import partial

import torch
from torch import nn

Autocast = Callable[[], AbstractContextManager[object]]


def compute_dtype(tensor: torch.Tensor) -> torch.dtype:
    """Return the dtype of matmuls of `tensor`: autocast's, or its own where autocast is off."""
    device = tensor.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else tensor.dtype


def to_compute_dtype(*tensors: torch.Tensor) -> list[torch.Tensor]:
    """Convert the inputs of an op of ours as autocast would: it knows torch's own ops only."""
    return [tensor.to(compute_dtype(tensor)) for tensor in tensors]


def capture_autocast(device: torch.device) -> Autocast:
    """Return a context that restores the current autocast state of `device`, for recomputation in backward."""
    kind = device.type
    return partial(torch.autocast, kind, dtype=torch.get_autocast_dtype(kind), enabled=torch.is_autocast_enabled(kind))


def autocast_off(device: torch.device) -> AbstractContextManager[object]:
    """Return a context without autocast, for ops that choose their dtypes themselves."""
    return torch.autocast(device.type, enabled=False)


def round_output(module: nn.Module) -> None:
    """Round what `module` puts out to the compute dtype from now on.

    Called for the module that begins the residual stream, it rounds all of the stream: each branch that is added has
    the compute dtype already.
    """
    module.register_forward_hook(lambda module, inputs, output: output.to(compute_dtype(output)))
