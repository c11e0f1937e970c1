"""Load a state on one rank and send it to the others, so that a checkpoint is read once and not by every rank."""

from collections.abc import Callable

import torch

from gpt.checkpoint.app_state import AppState
from gpt.utils.distributed import DistContext


def load_on_all_ranks(load: Callable[[], None], state: AppState, dist: DistContext) -> None:
    """Load a state on rank 0, and copy all of it to the states of the other ranks.

    Args:
        load: reads files into rank 0's state; not called on other ranks.
        state: this rank's state.
        dist: the ranks.

    Raises:
        UserError: on every rank, if `load` fails.
    """
    dist.on_main(load)
    if dist.world_size == 1:
        return
    saved = state.optimizer_tensors() if dist.is_main else {}
    entries = [(name, str(value.dtype).removeprefix("torch."), list(value.shape)) for name, value in saved.items()]
    entries, progress = dist.broadcast((entries, state.progress_json() if dist.is_main else None))
    model = state.model_tensors()
    if dist.is_main:
        optimizer = {name: value.to(dist.device) for name, value in saved.items()}
    else:
        optimizer = {
            name: torch.empty(shape, dtype=getattr(torch, dtype), device=dist.device) for name, dtype, shape in entries
        }
    dist.broadcast_tensors([*model.values(), *optimizer.values()])
    if not dist.is_main:
        state.load(model, optimizer, progress)
