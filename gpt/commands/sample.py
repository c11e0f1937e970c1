"""`gpt sample RUN_DIR --prompt TEXT`: generate text with a trained model."""

import itertools
import logging
import sys
from collections.abc import Iterable, Sequence
from typing import Annotated, Literal

from pydantic import Field

from gpt.commands.output import print_json
from gpt.configs.base import FilePath
from gpt.configs.cli import JsonOutput, parse
from gpt.configs.fields import POSITIONAL
from gpt.configs.observer_config import SampleConfig
from gpt.utils.helper import plural, printable

log = logging.getLogger(__name__)


class SampleCommand(JsonOutput, SampleConfig):
    """Continue a prompt with a trained model."""

    run_dir: Annotated[FilePath, POSITIONAL]
    """Folder of a run, or of one of its checkpoints."""
    prompt: str = ""
    """Text to continue; an empty prompt starts a new document."""
    seed: int = Field(0, ge=0, le=2**63 - 1)
    """Seed of the sample; the same seed gives the same text."""
    device: Literal["auto", "cpu", "cuda", "mps"] = "auto"
    """Device to run the model on; auto: cuda, else mps, else cpu."""


def run(argv: Sequence[str]) -> int:
    """Parse the flags, load the model, and print the text while it is generated."""
    command = parse(SampleCommand, argv, prog="gpt sample")

    import numpy as np

    from gpt.inference.generate import generate
    from gpt.inference.load import load_for_inference

    model, tokenizer = load_for_inference(command.run_dir, command.device)
    prompt = tokenizer.encode_prompt(command.prompt)
    lost = tokenizer.find_unrepresented(command.prompt, np.array(prompt))
    if lost is not None:
        characters = plural(lost.characters, "character")
        log.warning("--prompt: the tokenizer has no token for %s, first %s", characters, lost.first)
    generated = generate(
        model,
        prompt,
        command,
        block_size=model.config.block_size,
        vocab_size=tokenizer.vocab_size,
        seed=command.seed,
        end_of_text=tokenizer.end_of_text,
    )
    joined_to = prompt if command.prompt else ()  # the end-of-text token before a new document is not part of it
    if command.as_json:
        tokens = list(generated)
        completion = "".join(tokenizer.decode_stream(tokens, prompt=joined_to))
        print_json(
            {"prompt": command.prompt, "completion": completion, "new_tokens": len(tokens), "seed": command.seed}
        )
    else:
        _print_stream(itertools.chain([command.prompt], tokenizer.decode_stream(generated, prompt=joined_to)))
    return 0


def _print_stream(texts: Iterable[str]) -> None:
    show = printable if sys.stdout.isatty() else str
    for text in texts:
        sys.stdout.write(show(text))
        sys.stdout.flush()
    sys.stdout.write("\n")
