"""`gpt import DIR --out RUN_DIR`: make a run folder of a model in Hugging Face's format."""

from collections.abc import Sequence
from typing import Annotated

from pydantic import Field

from gpt.commands.output import build_console, print_json
from gpt.configs.base import FilePath
from gpt.configs.cli import JsonOutput, parse
from gpt.configs.fields import POSITIONAL
from gpt.errors import UserError


class ImportCommand(JsonOutput):
    """Make a run folder of a model in Hugging Face's format: GPT-2, Llama, Mistral, Qwen 2 or Qwen 3."""

    source: Annotated[str, POSITIONAL] = Field(min_length=1)
    """Folder with config.json, tokenizer.json and the weights; or hf:NAME, which is downloaded."""
    out: FilePath
    """Run folder to create."""
    block_size: int = Field(0, ge=0, le=2**26)
    """Longest context in tokens, at most the model's; 0: the model's."""


def run(argv: Sequence[str]) -> int:
    """Parse the flags, then import."""
    command = parse(ImportCommand, argv, prog="gpt import")

    from gpt.configs.load import load_config
    from gpt.configs.user_folders import expand_home
    from gpt.interop.imported_run import download_model, import_model
    from gpt.interop.model_folder import open_model_folder
    from gpt.utils.atomic_io import require_writable
    from gpt.utils.helper import printable

    if command.out.exists():
        raise UserError(f"--out {command.out} exists already; name another folder")
    source = open_model_folder(download_model(expand_home(command.source)))
    require_writable(command.out.absolute().parent, "--out")
    checkpoint = import_model(source, command.out, block_size=command.block_size)
    model = load_config(checkpoint / "config.json").model
    facts = {
        "run": str(command.out),
        "source": command.source,
        "parameters": f"{model.n_parameters:,}",
        "context": f"{model.block_size:,} tokens",
        "vocabulary": f"{source.tokenizer.vocab_size:,} tokens, {model.vocab_size:,} rows",
    }
    if command.as_json:
        print_json(facts)
        return 0
    path = command.out
    hints = {
        "next": f"gpt sample {path} --prompt TEXT",
        "": f"gpt train --config {path}/config.json --init-from {path} --run-dir RUN_DIR --data.source TEXTS",
    }
    build_console().write_rows({name: printable(value) for name, value in (facts | hints).items()})
    return 0
