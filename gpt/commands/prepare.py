"""`gpt prepare SOURCE... --out DIR`: turn texts into tokens; `gpt prepare --inspect DIR`: show a prepared folder."""

import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from gpt.commands.output import build_console, print_json
from gpt.configs.base import FilePath
from gpt.configs.cli import JsonOutput, parse
from gpt.configs.data_config import PreparationConfig, Source
from gpt.configs.fields import POSITIONAL
from gpt.errors import UserError

if TYPE_CHECKING:
    from gpt.data.manifest import CorpusManifest
    from gpt.data.shards import ShardInfo

EXCERPT_TOKENS = 128
"""Tokens of the first text that `--inspect` shows."""


class PrepareCommand(JsonOutput, PreparationConfig):
    """Turn texts into tokens, once for many runs; gpt train --data.source DIR reads the folder."""

    source: Annotated[tuple[Source, ...], POSITIONAL] = ()
    """Sources, as in --data.source of gpt train."""
    out: FilePath | None = None
    """Folder to create."""
    inspect: FilePath | None = None
    """Folder to show and to verify, instead of preparing one."""


def run(argv: Sequence[str]) -> int:
    """Parse the flags, then prepare or inspect a folder."""
    command = parse(PrepareCommand, argv, prog="gpt prepare")
    if command.inspect is not None and (command.source or command.out is not None):
        raise UserError(
            f"--inspect {command.inspect} shows one folder and prepares nothing; leave out SOURCE and --out"
        )

    from gpt.utils.helper import printable

    with _name_own_flags():
        facts = _inspect(command.inspect) if command.inspect is not None else _prepare(command)
    if command.as_json:
        print_json(facts)
        return 0
    console = build_console()
    console.write_rows(_format_rows(facts))
    if "excerpt" in facts:
        console.write_text(printable(facts["excerpt"]))
    return 0


@contextmanager
def _name_own_flags() -> Iterator[None]:
    """Replace the flags of gpt train's section `data` in errors and log messages by those of this command."""

    def rename(message: str) -> str:
        return message.replace("--data.source ", "").replace("--data.", "--")

    def rename_in_record(record: logging.LogRecord) -> bool:
        record.msg, record.args = rename(record.getMessage()), ()
        return True

    handlers = list(logging.getLogger().handlers)
    for handler in handlers:
        handler.addFilter(rename_in_record)
    try:
        yield
    except UserError as error:
        raise UserError(rename(str(error))) from error
    finally:
        for handler in handlers:
            handler.removeFilter(rename_in_record)


def _prepare(command: PrepareCommand) -> dict[str, Any]:
    from gpt.data.manifest import read_corpus_manifest
    from gpt.data.prepare.preparation import prepare_folder
    from gpt.data.prepare.preparation_plan import plan_preparation
    from gpt.data.prepare.sources import require_apart
    from gpt.utils.atomic_io import require_writable

    if not command.source or command.out is None:
        raise UserError("usage: gpt prepare SOURCE... --out DIR [--flags], or gpt prepare --inspect DIR")
    if command.out.exists():
        raise UserError(f"--out {command.out} exists already; gpt prepare --inspect shows it, or name another folder")
    require_apart(command.out, "--out", (*command.source, *command.val_source), below_only=True)
    require_writable(command.out.parent, "--out")
    prepare_folder(command.out, plan_preparation(command.source, command), "--out")
    return _describe(command.out, read_corpus_manifest(command.out))


def _inspect(folder: Path) -> dict[str, Any]:
    """Compare every file of a prepared folder with its digest, and describe the folder.

    Raises:
        UserError: a file is missing or has changed.
    """
    from gpt.data.manifest import read_corpus_manifest
    from gpt.data.tokenizer import TOKENIZER_FILE
    from gpt.utils.helper import sha256_of_file

    _require_prepared(folder)
    manifest = read_corpus_manifest(folder)
    digests = {TOKENIZER_FILE: manifest.tokenizer_sha256} | {shard.file: shard.sha256 for shard in manifest.shards}
    for name, expected in digests.items():
        path = folder / name
        try:
            actual = sha256_of_file(path)
        except OSError as error:
            raise UserError(f"{path}: cannot be read: {error.strerror}; prepare the folder again") from error
        if actual != expected:
            raise UserError(f"{path}: changed: its SHA-256 is {actual}, not {expected}; prepare the folder again")
    return _describe(folder, manifest) | {"excerpt": _read_excerpt(folder, manifest)}


def _require_prepared(folder: Path) -> None:
    """Check that `--inspect` names a prepared folder, and not the texts or the run that someone may mean by it."""
    from gpt.data.manifest import CORPUS_MANIFEST
    from gpt.data.prepare.folders import is_run

    if (folder / CORPUS_MANIFEST).is_file():
        return
    reason, remedy = "no prepared corpus here", f"gpt prepare {folder} --out DIR prepares the texts in it"
    if folder.with_name(f".{folder.name}.unfinished").exists():
        reason, remedy = "not complete yet", "run the same gpt prepare again, which resumes the preparation"
    elif not folder.exists():
        reason, remedy = "no such folder", "name a folder that gpt prepare has written"
    elif is_run(folder):
        reason, remedy = "the folder of a run, not a prepared one", f"gpt verify {folder} checks its checkpoints"
    raise UserError(f"--inspect {folder}: {reason}; {remedy}")


def _describe(folder: Path, manifest: "CorpusManifest") -> dict[str, Any]:
    """Return the facts about a prepared folder as JSON-able values."""
    facts = manifest.model_dump(
        mode="json",
        include={"sha256", "tokenizer_sha256", "vocab_size", "special_ids", "dtype", "largest_id", "tokens"}
        | {"documents", "text_bytes"},
    )
    sources = [
        {
            "name": source.name,
            "train": _count(source.train),
            "val": _count(source.val),
            "skipped_records": source.skipped_records,
            "duplicates": source.duplicates,
            "unrepresented": source.unrepresented,
        }
        for source in manifest.sources
    ]
    note = {"vocab_note": manifest.vocab_note} if manifest.vocab_note else {}
    return {"folder": str(folder), **facts, **note, "sources": sources}


def _count(shards: "Sequence[ShardInfo]") -> dict[str, int]:
    return {
        "tokens": sum(shard.tokens for shard in shards),
        "documents": sum(shard.documents for shard in shards),
        "shards": len(shards),
    }


def _format_rows(facts: dict[str, Any]) -> dict[str, str]:
    """Return the rows that describe a prepared folder."""
    from gpt.utils.helper import format_count, plural, printable

    special = ", ".join(f"{name} {index}" for name, index in facts["special_ids"].items()) or "no special ids"
    rows = {
        "folder": facts["folder"],
        "sha256": facts["sha256"],
        "tokenizer": f"{facts['vocab_size']:,} tokens, {special}, {facts['tokenizer_sha256']}",
        **({"note": facts["vocab_note"]} if "vocab_note" in facts else {}),
        "tokens": f"{facts['tokens']:,} as {facts['dtype']}, largest id {facts['largest_id']:,}",
        "text": f"{plural(facts['documents'], 'document')}, {plural(facts['text_bytes'], 'byte')}",
    }
    for source in facts["sources"]:
        for split in ("train", "val"):
            count = source[split]
            documents, shards = plural(count["documents"], "document"), plural(count["shards"], "shard")
            rows[f"{source['name']} {split}"] = f"{format_count(count['tokens'])} tokens, {documents}, {shards}"
        if source["skipped_records"] or source["duplicates"]:
            skipped = plural(source["skipped_records"], "bad record")
            rows[f"{source['name']} left out"] = f"{skipped}, {plural(source['duplicates'], 'duplicate')}"
        if source["unrepresented"]:
            rows[f"{source['name']} without a token"] = plural(source["unrepresented"], "character")
    return {printable(name): printable(value) for name, value in rows.items()}


def _read_excerpt(folder: Path, manifest: "CorpusManifest") -> str:
    """Return the beginning of the first text."""
    from gpt.data.shards import TokenStream
    from gpt.data.tokenizer import TOKENIZER_FILE, Tokenizer

    tokenizer = Tokenizer.from_file(folder / TOKENIZER_FILE)
    stream = TokenStream([(folder, shard) for shard in manifest.shards], tokenizer.vocab_size)
    return tokenizer.decode(stream.read(0, min(EXCERPT_TOKENS, len(stream))).tolist())
