"""`gpt parity DIR`: compare a model with the same weights in transformers."""

from collections.abc import Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated

from pydantic import Field

from gpt.commands.output import build_console, print_json
from gpt.configs.base import FilePath
from gpt.configs.cli import JsonOutput, parse
from gpt.configs.fields import POSITIONAL
from gpt.errors import UserError

if TYPE_CHECKING:
    from gpt.data.tokenizer import Tokenizer
    from gpt.models.gpt import GPT


class ParityCommand(JsonOutput):
    """Compare logits, loss, every gradient and an optimizer step of a model with transformers, in float32."""

    folder: Annotated[FilePath, POSITIONAL]
    """Folder of a run, of a checkpoint, or of a model in Hugging Face's format."""
    tolerance: float = Field(1e-4, gt=0, le=1)
    """Largest difference, relative to the largest value or to 1; with a larger one the exit status is 1."""


def run(argv: Sequence[str]) -> int:
    """Parse the flags, compare, and return 1 if a difference exceeds the tolerance."""
    command = parse(ParityCommand, argv, prog="gpt parity")

    from gpt.interop import transformers_runtime
    from gpt.interop.parity import compare_with_transformers

    if not transformers_runtime.is_installed():
        raise UserError("gpt parity needs transformers: pip install transformers")
    differences = compare_with_transformers(*_load(command))
    is_equal = all(item.relative <= command.tolerance for item in differences)
    if command.as_json:
        print_json({"equal": is_equal, "differences": [asdict(item) for item in differences]})
    else:
        rows = {
            item.quantity: f"largest difference {item.difference:.2e} at {item.place} (largest value {item.scale:.3g})"
            for item in differences
        }
        build_console().write_rows(
            rows | {"result": "equal" if is_equal else f"differs by more than {command.tolerance:g}"}
        )
    return int(not is_equal)


def _load(command: ParityCommand) -> "tuple[GPT, Tokenizer]":
    import torch

    from gpt.inference.load import load_for_inference
    from gpt.interop.families import require_family
    from gpt.interop.model_folder import is_model_folder, open_model_folder
    from gpt.models.gpt import GPT

    if not is_model_folder(command.folder):
        loaded = load_for_inference(command.folder, "cpu", "float32")
        require_family(loaded.model.config)
        return loaded.model, loaded.tokenizer
    source = open_model_folder(command.folder)
    model = GPT.build_empty(source.config, torch.device("cpu"))
    model.load_state_dict(source.read_weights())
    return model.eval(), source.tokenizer
