"""Architecture and tokenizer of the weights that --init-from names."""

from pathlib import Path

from gpt.checkpoint.run_folder import find_run, locate_checkpoint
from gpt.configs.data_config import TOKENIZER_KINDS
from gpt.configs.gpt_config import GPTConfig
from gpt.configs.load import load_config
from gpt.data.tokenizer import TOKENIZER_FILE
from gpt.errors import UserError
from gpt.interop.imported_run import download_model
from gpt.interop.model_folder import is_model_folder, read_model_config

LEARNED_KINDS = ("bpe", "char")
"""Kinds of tokenizers that a corpus decides, so that a run's own file has to be named."""


def describe_weights(source: str) -> tuple[GPTConfig, str] | None:
    """Return the architecture of weights, and the value of --data.tokenizer that gives their tokenizer.

    Args:
        source: a run, a checkpoint, a model folder, or hf:NAME.

    Returns:
        None if there are no such weights, which is reported when they are loaded.

    Raises:
        UserError: the model is not supported, or cannot be downloaded.
    """
    try:
        folder = download_model(source)
        if is_model_folder(folder):
            return read_model_config(folder), str((folder / TOKENIZER_FILE).absolute())
    except UserError as error:
        raise UserError(f"--init-from {error}") from error
    try:
        checkpoint = locate_checkpoint(Path(source), "--init-from")
        config = load_config(checkpoint / "config.json")
    except UserError:
        return None
    kind = config.data.tokenizer
    if kind not in TOKENIZER_KINDS or kind in LEARNED_KINDS:
        kind = str(find_run(checkpoint).tokenizer)
    return config.model, kind
