"""The runtime of Hugging Face folders: transformers, which is imported only where it is installed."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from gpt.configs.gpt_config import GPTConfig
from gpt.interop.hf_config import describe_config
from gpt.interop.huggingface import Tensors, export_tensors


def is_installed() -> bool:
    """Return whether transformers can be imported."""
    return find_spec("transformers") is not None


class TransformersRuntime:
    """A model folder, loaded by transformers in float32.

    Args:
        folder: the folder.
    """

    def __init__(self, folder: Path):
        with _quiet_transformers() as transformers:
            self.name = f"transformers {transformers.__version__}"
            self._model = transformers.AutoModelForCausalLM.from_pretrained(
                folder, dtype=torch.float32, local_files_only=True, trust_remote_code=False
            ).eval()
            self._tokenizer = transformers.AutoTokenizer.from_pretrained(folder, local_files_only=True)

    def encode(self, text: str) -> list[int]:
        """Return the ids of ordinary text."""
        with _quiet_transformers():  # it warns of a text that is longer than the context
            ids: list[int] = self._tokenizer(text, add_special_tokens=False, split_special_tokens=True)["input_ids"]
        return ids

    @torch.no_grad()
    def compute_logits(self, ids: Sequence[int]) -> torch.Tensor:
        """Return the logits after each token, (T, V) float32."""
        logits: torch.Tensor = self._model(torch.tensor([ids])).logits[0].float()
        return logits

    @torch.no_grad()
    def continue_greedily(self, ids: Sequence[int], n_tokens: int) -> list[int]:
        """Return the most likely next token, `n_tokens` times."""
        if not n_tokens:
            return []
        prompt = torch.tensor([ids])
        with _quiet_transformers():
            tokens = self._model.generate(
                prompt,
                attention_mask=torch.ones_like(prompt),
                max_new_tokens=n_tokens,
                do_sample=False,
                eos_token_id=None,
                pad_token_id=0,
            )
        continued: list[int] = tokens[0, len(ids) :].tolist()
        return continued


def build_model(weights: Tensors, config: GPTConfig) -> Any:
    """Return a transformers model with the weights of a GPT, float32 and in evaluation mode.

    Args:
        weights: state dict of a GPT.
        config: its resolved configuration.

    Raises:
        UserError: no class of transformers has this configuration.
    """
    content = describe_config(config)
    with _quiet_transformers() as transformers:
        model = transformers.AutoModelForCausalLM.from_config(transformers.AutoConfig.for_model(**content))
    result = model.load_state_dict(export_tensors(weights, config), strict=False)
    assert not result.unexpected_keys and set(result.missing_keys) <= {"lm_head.weight"}, result
    model.tie_weights()
    model.loss_type = "ForCausalLM"  # else it is guessed, with a warning
    return model.float().eval()


@contextmanager
def _quiet_transformers() -> Iterator[Any]:
    """Yield the package with its progress bars and warnings turned off; restore them afterwards."""
    import transformers

    logging: Any = transformers.utils.logging
    verbosity, has_bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield transformers
    finally:
        logging.set_verbosity(verbosity)
        if has_bars:
            logging.enable_progress_bar()
