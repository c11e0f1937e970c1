"""compile, then DDP: the fixed order in which a model is made ready to train."""

import logging
from collections.abc import Callable

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from gpt.utils.distributed import DistContext
from gpt.utils.helper import first_line

log = logging.getLogger(__name__)


def compile_in_place(model: nn.Module, trial: Callable[[], object]) -> bool:
    """Compile without wrapping, so that no name in a state dict changes; whether it worked.

    `trial` runs the model once, forward and backward: what the compiler cannot do shows before the first step, and
    the model then runs as it is.
    """
    model.compile()
    try:
        trial()
    except Exception as error:  # any of the compiler's many: no C++ compiler, no Triton, an unsupported Python
        model._compiled_call_impl = None
        torch._dynamo.reset()
        log.warning("torch.compile does not work here (%s); going on without it", first_line(error))
        return False
    finally:
        model.zero_grad(set_to_none=True)
    return True


def distribute(model: nn.Module, dist: DistContext) -> nn.Module:
    """Wrap in DDP where there are several processes; gradients are then averaged over them."""
    if dist.world_size == 1:
        return model
    return DistributedDataParallel(
        model,
        device_ids=[dist.device] if dist.device.type == "cuda" else None,
        broadcast_buffers=False,
        gradient_as_bucket_view=True,
    )
