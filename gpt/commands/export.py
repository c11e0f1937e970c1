"""`gpt export RUN_DIR --to hf|gguf --out DIR`: write a trained model for other programs, and prove that it is equal."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, Self

from pydantic import model_validator

from gpt.commands.output import build_console, print_json
from gpt.configs.base import FilePath
from gpt.configs.cli import JsonOutput, parse
from gpt.configs.fields import POSITIONAL
from gpt.errors import UserError

if TYPE_CHECKING:
    from gpt.configs.gpt_config import GPTConfig
    from gpt.data.tokenizer import Tokenizer
    from gpt.inference.language_model import LanguageModel
    from gpt.interop.proof import Proof
    from gpt.models.gpt import GPT

MODEL_CARD = "README.md"
HF_TOLERANCE = 1e-4
"""Largest difference of two logits in transformers, relative to the largest logit or to 1."""
GGUF_TOLERANCES = {"float32": 1e-3, "float16": 1e-2, "bfloat16": 2e-2, "q8_0": 5e-2}
"""The same in llama.cpp, by the type of the weights, to which it rounds activations as well. Its GELU is a table of
float16 numbers, also for float32 weights."""


class ExportCommand(JsonOutput):
    """Write a trained model in a format of other programs, and compare it there with its source."""

    run_dir: Annotated[FilePath, POSITIONAL]
    """Folder of a run, or of one of its checkpoints."""
    to: Literal["hf", "gguf"]
    """Format: hf is a folder for transformers, vLLM and other programs that read Hugging Face's format; gguf is a file
    for llama.cpp and the programs built on it."""
    out: FilePath
    """Folder to create."""
    dtype: Literal["float32", "bfloat16", "float16", "q8_0"] = "float32"
    """Type of the weights in the files; q8_0 (8 bits and a scale for each 32 weights) is for gguf."""

    @model_validator(mode="after")
    def _require_type_of_format(self) -> Self:
        if self.dtype == "q8_0" and self.to != "gguf":
            raise ValueError(f"--dtype q8_0 needs --to gguf; --to {self.to} takes float32, bfloat16 or float16")
        return self


def run(argv: Sequence[str]) -> int:
    """Parse the flags, check what can be checked without the weights, then export."""
    command = parse(ExportCommand, argv, prog="gpt export")

    from gpt.checkpoint.run_folder import locate_checkpoint
    from gpt.configs.load import load_config
    from gpt.inference.load import load_for_inference
    from gpt.utils.atomic_io import require_writable

    if command.out.exists():
        raise UserError(f"--out {command.out} exists already; name another folder")
    checkpoint = locate_checkpoint(command.run_dir, "RUN_DIR")
    _require_exportable(command.to, load_config(checkpoint / "config.json").model.resolve())
    require_writable(command.out.absolute().parent, "--out")
    loaded = load_for_inference(checkpoint, "cpu", "float32")
    facts = export(command, checkpoint, loaded)
    if command.as_json:
        print_json(facts)
    else:
        build_console().write_rows(facts)
    return 0


def export(command: ExportCommand, checkpoint: Path, loaded: "LanguageModel") -> dict[str, str]:
    """Commit the folder once its content is proven, and return the facts to print.

    Raises:
        UserError: the export differs from its source; nothing is written then.
    """
    from gpt.interop.model_card import read_origin, write_model_card
    from gpt.utils.atomic_io import commit_folder, write_text
    from gpt.utils.helper import format_si

    write = {"hf": _write_hf, "gguf": _write_gguf}[command.to]
    with commit_folder(command.out) as folder:
        architecture, prove = write(folder, command, loaded)
        size = sum(path.stat().st_size for path in folder.iterdir())
        proof = _describe(prove(), command.to)
        card = write_model_card(
            name=command.out.absolute().name,
            library={"hf": "transformers", "gguf": "gguf"}[command.to],
            architecture=architecture,
            n_parameters=loaded.model.config.n_parameters,
            dtype=command.dtype,
            origin=read_origin(checkpoint),
            tokenizer=loaded.tokenizer,
            proof=proof,
        )
        write_text(folder / MODEL_CARD, card)
    return {
        "folder": str(command.out),
        "source": str(checkpoint),
        "class": architecture,
        "weights": f"{command.dtype}, {format_si(size, 'B')} with the tokenizer",
        "proof": proof,
    }


Prove = Callable[[], "Proof | None"]
"""Compares an export with its source; returns None where the runtime is not installed."""


def _require_exportable(to: str, config: "GPTConfig") -> None:
    from gpt.interop import gguf
    from gpt.interop.families import require_family

    require_family(config)
    if to == "gguf":
        gguf.require_architecture(config)
        if not gguf.is_installed():
            raise UserError("--to gguf needs the package gguf: pip install 'gpt-training-pipeline[gguf]'")


def _write_hf(folder: Path, command: ExportCommand, loaded: "LanguageModel") -> tuple[str, Prove]:
    import torch

    from gpt.interop.model_folder import choose_family, write_model_folder

    model, tokenizer, dtype = loaded.model, loaded.tokenizer, getattr(torch, command.dtype)
    write_model_folder(
        folder, dict(model.state_dict()), model.config, tokenizer, dtype=dtype, chat_template=loaded.chat_template
    )
    return choose_family(model.config, tokenizer).architecture, lambda: _prove_hf(folder, model, tokenizer, dtype)


def _prove_hf(folder: Path, model: "GPT", tokenizer: "Tokenizer", dtype: Any) -> "Proof | None":
    """Compare the folder with the model in transformers."""
    from gpt.interop import transformers_runtime
    from gpt.interop.proof import prove

    if not transformers_runtime.is_installed():
        return None
    # The files hold rounded weights: both sides compute with these, in float32.
    model.load_state_dict({name: tensor.to(dtype) for name, tensor in model.state_dict().items()})
    return prove(model, tokenizer, transformers_runtime.TransformersRuntime(folder), tolerance=HF_TOLERANCE)


def _write_gguf(folder: Path, command: ExportCommand, loaded: "LanguageModel") -> tuple[str, Prove]:
    from gpt.interop import gguf

    model, tokenizer = loaded.model, loaded.tokenizer
    path = folder / f"{command.out.absolute().name}-{gguf.TYPES[command.dtype]}.gguf"
    gguf.write_gguf(
        path, model.state_dict(), model.config, tokenizer, dtype=command.dtype, chat_template=loaded.chat_template
    )
    architecture = gguf.require_architecture(model.config)
    return architecture, lambda: _prove_gguf(path, model, tokenizer, command.dtype)


def _prove_gguf(path: Path, model: "GPT", tokenizer: "Tokenizer", dtype: str) -> "Proof | None":
    """Compare the file with the model in llama.cpp."""
    from gpt.interop import gguf, llama_cpp_runtime
    from gpt.interop.gguf_tokenizer import list_comparable_texts
    from gpt.interop.proof import MAX_COMPARED_TOKENS, prove

    if not llama_cpp_runtime.is_installed():
        return None
    model.load_state_dict(gguf.round_weights(model.state_dict(), model.config, dtype=dtype))
    context = min(model.config.block_size, MAX_COMPARED_TOKENS)
    with llama_cpp_runtime.LlamaCppRuntime(path, context=context, vocab_size=tokenizer.vocab_size) as runtime:
        texts = list_comparable_texts(tokenizer)
        return prove(model, tokenizer, runtime, tolerance=GGUF_TOLERANCES[dtype], texts=texts)


def _describe(proof: "Proof | None", to: str) -> str:
    runtime = {"hf": "transformers", "gguf": "llama-cpp-python"}[to]
    return f"not proven: {runtime} is not installed" if proof is None else str(proof)
