"""Loading of a trained model for inference."""

from pathlib import Path

import torch

from gpt.checkpoint.app_state import load_model_tensors
from gpt.checkpoint.run_folder import find_run, locate_checkpoint
from gpt.checkpoint.store import read_weights
from gpt.configs.load import load_config
from gpt.data.tokenizer import Tokenizer
from gpt.errors import UserError
from gpt.machine.hardware import find_device
from gpt.models.gpt import GPT
from gpt.utils.helper import format_count


def load_for_inference(path: Path, device: str) -> tuple[GPT, Tokenizer]:
    """Load a trained model and its tokenizer from a run folder (its newest checkpoint) or a checkpoint.

    Args:
        path: run folder or checkpoint.
        device: auto, cpu, cuda or mps.

    Raises:
        UserError: there is no checkpoint, or it is damaged.
    """
    checkpoint = locate_checkpoint(path, "RUN_DIR")
    tokenizer = Tokenizer.from_file(find_run(checkpoint).tokenizer)
    weights = read_weights(checkpoint)
    config = load_config(checkpoint / "config.json").model
    embedding = weights.get("wte.weight", torch.empty(0))
    config = config.model_copy(update={"vocab_size": len(embedding)})
    n_weights = sum(tensor.numel() for tensor in weights.values())
    if config.n_parameters != n_weights:  # before the model is allocated
        raise UserError(
            f"{checkpoint}: config.json describes a model of {format_count(config.n_parameters)} parameters, but the "
            f"weights have {format_count(n_weights)}; use a checkpoint as it was saved"
        )
    model = GPT(config, seed=0)
    load_model_tensors(model, weights)
    return model.to(find_device(device)).eval(), tokenizer
