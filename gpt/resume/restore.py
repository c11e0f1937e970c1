"""Bring a run's state to where the run starts."""

from gpt.checkpoint.app_state import AppState, load_model_tensors
from gpt.checkpoint.manifest import MODEL
from gpt.checkpoint.replicate import load_on_all_ranks
from gpt.checkpoint.store import load_checkpoint
from gpt.checkpoint.tensor_file import read_tensors
from gpt.errors import UserError
from gpt.models.gpt import shorten_context
from gpt.resume.find import Start
from gpt.utils.distributed import DistContext


def restore_state(start: Start, state: AppState, dist: DistContext) -> None:
    """Load the checkpoint of `start`, or the weights of --init-from; leave initial weights as they are.

    Rank 0 verified the files when it found the start. It alone reads them, and sends the state to the other ranks.

    Raises:
        UserError: on every rank, if rank 0 cannot load it.
    """
    if start.loads_weights:
        load_on_all_ranks(lambda: _load(start, state), state, dist)


def _load(start: Start, state: AppState) -> None:
    if start.checkpoint is not None:
        load_checkpoint(start.checkpoint, state)
    elif start.init_from is not None:
        weights = read_tensors(start.init_from / MODEL)
        positions = state.model.state_dict().get("wpe.weight")
        if positions is not None:
            weights = shorten_context(weights, len(positions))
        try:
            load_model_tensors(state.model, weights)
        except UserError as error:
            raise UserError(f"--init-from {start.init_from}: {error}") from error
