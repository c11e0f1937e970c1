"""`gpt export RUN_DIR --to hf|gguf --out DIR`: write a trained model for other programs, and prove that it is equal."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from gpt.commands.output import build_console, print_json
from gpt.configs.base import FilePath
from gpt.configs.cli import JsonOutput, parse
from gpt.configs.fields import POSITIONAL
from gpt.errors import UserError

if TYPE_CHECKING:
    from gpt.data.tokenizer import Tokenizer
    from gpt.interop.proof import Proof
    from gpt.models.gpt import GPT

MODEL_CARD = "README.md"
HF_TOLERANCE = 1e-4
"""Largest difference of two logits in transformers, relative to the largest logit or to 1."""


class ExportCommand(JsonOutput):
    """Write a trained model in a format of other programs, and compare it there with its source."""

    run_dir: Annotated[FilePath, POSITIONAL]
    """Folder of a run, or of one of its checkpoints."""
    to: Literal["hf"]
    """Format: hf is a folder for transformers, vLLM and other programs that read Hugging Face's format."""
    out: FilePath
    """Folder to create."""
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    """Type of the weights in the files."""


def run(argv: Sequence[str]) -> int:
    """Parse the flags, check what can be checked without the weights, then export."""
    command = parse(ExportCommand, argv, prog="gpt export")

    from gpt.checkpoint.run_folder import locate_checkpoint
    from gpt.configs.load import load_config
    from gpt.inference.load import load_for_inference
    from gpt.interop.families import require_family
    from gpt.utils.atomic_io import require_writable

    if command.out.exists():
        raise UserError(f"--out {command.out} exists already; name another folder")
    checkpoint = locate_checkpoint(command.run_dir, "RUN_DIR")
    require_family(load_config(checkpoint / "config.json").model)
    require_writable(command.out.absolute().parent, "--out")
    loaded = load_for_inference(checkpoint, "cpu")
    facts = export(command, checkpoint, loaded.model, loaded.tokenizer)
    if command.as_json:
        print_json(facts)
    else:
        rows = {name: str(value) for name, value in facts.items() if value is not None}
        build_console().write_rows(rows)
    return 0


def export(command: ExportCommand, checkpoint: Path, model: "GPT", tokenizer: "Tokenizer") -> dict[str, Any]:
    """Commit the folder once its content is proven, and return the facts to print.

    Raises:
        UserError: the export differs from its source; nothing is written then.
    """
    import torch

    from gpt.interop.model_card import read_origin, write_model_card
    from gpt.interop.model_folder import choose_family, write_model_folder
    from gpt.utils.atomic_io import commit_folder, write_text
    from gpt.utils.helper import format_si

    architecture = choose_family(model.config, tokenizer).architecture
    weights = {name: tensor.detach() for name, tensor in model.state_dict().items()}
    with commit_folder(command.out) as folder:
        n_bytes = write_model_folder(folder, weights, model.config, tokenizer, dtype=getattr(torch, command.dtype))
        proof = _prove_hf(folder, model, tokenizer, command.dtype)
        card = write_model_card(
            name=command.out.absolute().name,
            architecture=architecture,
            n_parameters=model.config.n_parameters,
            dtype=command.dtype,
            origin=read_origin(checkpoint),
            tokenizer=tokenizer,
            proof=_describe(proof),
        )
        write_text(folder / MODEL_CARD, card)
    return {
        "folder": str(command.out),
        "source": str(checkpoint),
        "class": architecture,
        "weights": f"{format_si(n_bytes, 'B')}, {command.dtype}",
        "proof": _describe(proof),
    }


def _prove_hf(folder: Path, model: "GPT", tokenizer: "Tokenizer", dtype: str) -> "Proof | None":
    """Compare the folder with the model in transformers; None if transformers is not installed."""
    import torch

    from gpt.interop import transformers_runtime
    from gpt.interop.proof import prove

    if not transformers_runtime.is_installed():
        return None
    with torch.no_grad():
        for parameter in model.parameters():  # the files hold rounded weights: both compute with these, in float32
            parameter.copy_(parameter.to(getattr(torch, dtype)))
    return prove(model, tokenizer, transformers_runtime.TransformersRuntime(folder), tolerance=HF_TOLERANCE)


def _describe(proof: "Proof | None") -> str:
    return "not proven: transformers is not installed" if proof is None else str(proof)
