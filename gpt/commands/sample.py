"""`gpt sample RUN_DIR --prompt TEXT`: let a trained model continue a text."""

import itertools
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field

from gpt.configs.cli import POSITIONAL, parse
from gpt.configs.observer_config import SampleConfig
from gpt.utils.helper import printable


class SampleCommand(SampleConfig):
    """Continue a prompt with a trained model."""

    run_dir: Annotated[Path, POSITIONAL]
    """A run's folder, or one of its checkpoints."""
    prompt: str = ""
    """Text to continue; an empty one starts a document."""
    seed: int = Field(0, ge=0, le=2**63 - 1)
    """Decides the draws; the same seed gives the same text."""
    device: Literal["auto", "cpu", "cuda", "mps"] = "auto"
    """Where the model runs; auto: cuda, else mps, else cpu."""


def run(argv: Sequence[str]) -> int:
    """Parse, load, and print the text as it is drawn."""
    command = parse(SampleCommand, argv, prog="gpt sample")

    from gpt.inference.generate import generate
    from gpt.inference.load import load_for_inference

    model, tokenizer = load_for_inference(command.run_dir, command.device)
    new = generate(
        model,
        tokenizer.encode_prompt(command.prompt),
        command,
        block_size=model.config.block_size,
        vocab_size=tokenizer.vocab_size,
        seed=command.seed,
        end_of_text=tokenizer.end_of_text,
    )
    shown = printable if sys.stdout.isatty() else str
    for piece in itertools.chain([command.prompt], tokenizer.decode_stream(new)):
        sys.stdout.write(shown(piece))
        sys.stdout.flush()
    sys.stdout.write("\n")
    return 0
