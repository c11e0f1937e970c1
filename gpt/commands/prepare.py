"""`gpt prepare SOURCE... --out DIR`: turn texts into tokens; `gpt prepare --inspect DIR`: show what a folder holds."""

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

from gpt.configs.base import FilePath
from gpt.configs.cli import POSITIONAL, parse
from gpt.configs.data_config import PreparationConfig
from gpt.errors import UserError

SAMPLE_TOKENS = 128


class PrepareCommand(PreparationConfig):
    """Turn texts into tokens, once for many runs: gpt train --data.source DIR."""

    source: Annotated[tuple[str, ...], POSITIONAL] = ()
    """What --data.source of gpt train takes."""
    out: FilePath | None = None
    """Folder to make."""
    inspect: FilePath | None = None
    """Show what a prepared folder holds, and verify it; nothing is prepared."""


def run(argv: Sequence[str]) -> int:
    """Parse, then prepare or inspect."""
    command = parse(PrepareCommand, argv, prog="gpt prepare")
    try:
        if command.inspect is not None:
            _inspect(command.inspect)
        else:
            _prepare(command)
    except UserError as error:  # the flags are those of gpt train's section `data`
        raise UserError(str(error).replace("--data.source ", "").replace("--data.", "--")) from error
    return 0


def _prepare(command: PrepareCommand) -> None:
    from gpt.data.prepare.preparation import plan_preparation, prepare_folder
    from gpt.utils.atomic_io import require_writable

    if not command.source or command.out is None:
        raise UserError("usage: gpt prepare SOURCE... --out DIR [--flags], or gpt prepare --inspect DIR")
    if command.out.exists():
        raise UserError(f"--out {command.out} is there already; gpt prepare --inspect shows it, or name another folder")
    require_writable(command.out.parent, "--out")
    prepare_folder(command.out, plan_preparation(command.source, command), "--out")
    _show(command.out)


def _inspect(folder: Path) -> None:
    """Show the manifest and a text, and compare every shard with its digest."""
    from gpt.data.manifest import TOKENIZER_FILE, read_corpus_manifest
    from gpt.utils.helper import sha256_of_file

    manifest = read_corpus_manifest(folder)
    _show(folder)
    shards = [shard for source in manifest.sources for shard in (*source.train, *source.val)]
    for name, expected in [
        (TOKENIZER_FILE, manifest.tokenizer_sha256),
        *((shard.file, shard.sha256) for shard in shards),
    ]:
        path = folder / name
        try:
            found = sha256_of_file(path)
        except OSError as error:
            raise UserError(f"{path}: cannot be read: {error.strerror}; prepare the folder again") from error
        if found != expected:
            raise UserError(f"{path}: changed: its SHA-256 is {found}, not {expected}; prepare the folder again")
    _print(_sample(folder))


def _show(folder: Path) -> None:
    from rich.table import Table

    from gpt.data.manifest import read_corpus_manifest
    from gpt.utils.helper import format_si, plural

    manifest = read_corpus_manifest(folder)
    table = Table.grid(padding=(0, 2))
    special = ", ".join(f"{name} {index}" for name, index in manifest.special_ids.items())
    table.add_row("folder", str(folder))
    table.add_row("sha256", manifest.sha256)
    table.add_row(
        "tokenizer", f"{manifest.vocab_size:,} tokens, {special or 'no special ids'}, {manifest.tokenizer_sha256}"
    )
    table.add_row("tokens", f"{manifest.tokens:,} as {manifest.dtype}, the largest {manifest.largest_id:,}")
    table.add_row("text", f"{plural(manifest.documents, 'document')}, {manifest.text_bytes:,} bytes")
    for source in manifest.sources:
        for split, shards in (("train", source.train), ("val", source.val)):
            tokens = format_si(sum(shard.tokens for shard in shards))
            count = plural(sum(shard.documents for shard in shards), "document")
            table.add_row(f"{source.name} {split}", f"{tokens} tokens, {count}, {plural(len(shards), 'shard')}")
        if source.skipped_records or source.duplicates:
            left_out = f"{plural(source.skipped_records, 'bad record')}, {plural(source.duplicates, 'duplicate')}"
            table.add_row(f"{source.name} left out", left_out)
    _print(table)


def _sample(folder: Path) -> str:
    """The beginning of the first text."""
    from gpt.data.manifest import TOKENIZER_FILE, read_corpus_manifest
    from gpt.data.shards import TokenStream
    from gpt.data.tokenizer import Tokenizer
    from gpt.utils.helper import printable

    tokenizer = Tokenizer.from_file(folder / TOKENIZER_FILE)
    shards = [shard for source in read_corpus_manifest(folder).sources for shard in (*source.train, *source.val)]
    stream = TokenStream([(folder, shard) for shard in shards], tokenizer.vocab_size)
    return printable(tokenizer.decode(stream.read(0, min(SAMPLE_TOKENS, len(stream))).tolist()))


def _print(content: object) -> None:
    from rich.console import Console

    Console().print(content, markup=False, highlight=False, soft_wrap=True)
