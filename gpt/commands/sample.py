"""`gpt sample RUN_DIR --prompt TEXT`: generate text with a trained model."""

import itertools
import sys
from collections.abc import Iterable, Sequence
from typing import Annotated, Literal

from pydantic import Field

from gpt.commands.output import print_json
from gpt.configs.base import FilePath
from gpt.configs.cli import JsonOutput, parse
from gpt.configs.fields import POSITIONAL
from gpt.configs.observer_config import SampleConfig
from gpt.utils.helper import printable


class SampleCommand(JsonOutput, SampleConfig):
    """Continue a prompt with a trained model."""

    run_dir: Annotated[FilePath, POSITIONAL]
    """Folder of a run, or of one of its checkpoints."""
    prompt: str = ""
    """Text to continue; an empty prompt starts a new document."""
    seed: int = Field(0, ge=0, le=2**63 - 1)
    """Seed of the sample; the same seed gives the same text."""
    device: Literal["auto", "cpu", "cuda", "mps"] = "auto"
    """Device to run the model on; auto: cuda, else mps where it computes as the CPU does, else cpu."""
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """Dtype of weights and matmuls; auto: bfloat16 if the hardware has it, else float32."""


def run(argv: Sequence[str]) -> int:
    """Parse the flags, load the model, and print the text while it is generated."""
    command = parse(SampleCommand, argv, prog="gpt sample")

    from gpt.inference.load import load_for_inference

    model = load_for_inference(command.run_dir, command.device, command.dtype)
    text = model.build_completion(command.prompt, command, command.seed, place="--prompt")
    pieces = (piece for _, piece in model.run([text]))
    if command.as_json:
        completion = "".join(pieces)
        n_tokens = len(text.completion.tokens)
        print_json({"prompt": command.prompt, "completion": completion, "new_tokens": n_tokens, "seed": command.seed})
    else:
        _print_stream(itertools.chain([command.prompt], pieces))
    return 0


def _print_stream(texts: Iterable[str]) -> None:
    show = printable if sys.stdout.isatty() else str
    for text in texts:
        sys.stdout.write(show(text))
        sys.stdout.flush()
    sys.stdout.write("\n")
