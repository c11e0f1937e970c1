"""A GPT training pipeline: `gpt.run` resolves and checks a run, `gpt.pipeline` builds it, `gpt.main` starts it.

`gpt.load` loads a trained model, to generate and score text with it.
"""

from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from gpt.inference.language_model import LanguageModel

__version__ = "0.1.0"


def load(path: "str | Path", device: str = "auto", dtype: str = "auto") -> "LanguageModel":
    """Load a trained model with its tokenizer, to generate and score text.

    Args:
        path: folder of a run, whose newest checkpoint is loaded, or of a checkpoint.
        device: auto, cpu, cuda or mps.
        dtype: float32 or bfloat16; auto: bfloat16 if the hardware has it.

    Raises:
        UserError: there is no checkpoint, it is damaged, or this machine multiplies wrongly.
    """
    from gpt.inference.load import load_for_inference  # imports torch, which takes seconds

    return load_for_inference(Path(path), device, dtype)
