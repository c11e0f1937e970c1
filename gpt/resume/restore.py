"""Bring a run's state to where the run starts."""

from gpt.checkpoint.app_state import AppState, load_model_tensors
from gpt.checkpoint.manifest import MODEL
from gpt.checkpoint.store import load_checkpoint, read_weights, verify_and_load
from gpt.checkpoint.tensor_file import read_tensors
from gpt.errors import UserError
from gpt.models.gpt import shorten_context
from gpt.resume.find import Start
from gpt.utils.distributed import DistContext


def restore_state(start: Start, state: AppState, dist: DistContext) -> None:
    """Load the checkpoint of `start`, or the weights of --init-from; leave initial weights as they are.

    Every process hashes a checkpoint's files once: rank 0 did so when it found the start, the others do it here.

    Raises:
        UserError: on every rank, if one of them cannot load it.
    """
    dist.on_every_rank(lambda: _load(start, state, is_verified=dist.is_main))


def _load(start: Start, state: AppState, *, is_verified: bool) -> None:
    if start.checkpoint is not None:
        load = load_checkpoint if is_verified else verify_and_load
        load(start.checkpoint, state)
    elif start.init_from is not None:
        weights = read_tensors(start.init_from / MODEL) if is_verified else read_weights(start.init_from)
        positions = state.model.state_dict().get("wpe.weight")
        if positions is not None:
            weights = shorten_context(weights, len(positions))
        try:
            load_model_tensors(state.model, weights)
        except UserError as error:
            raise UserError(f"--init-from {start.init_from}: {error}") from error
