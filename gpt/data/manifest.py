"""corpus.json: what a prepared folder holds, with the digest of every part of it and its own."""

from pathlib import Path
from typing import Any

from pydantic import Field

from gpt.configs.base import Config
from gpt.data.shards import ShardInfo
from gpt.errors import UserError
from gpt.utils.sealed_json import read_sealed_json, write_sealed_json

CORPUS_FORMAT_VERSION = 2
CORPUS_MANIFEST = "corpus.json"
TOKENIZER_FILE = "tokenizer.json"


class SourceEntry(Config):
    """What became of one source."""

    name: str
    sha256: str
    """Fingerprint: digest of its files' names and contents."""
    train: tuple[ShardInfo, ...]
    val: tuple[ShardInfo, ...]
    skipped_records: int = 0
    duplicates: int = 0
    """Documents left out because an equal one came before."""


class CorpusManifest(Config):
    """What a prepared folder holds. It says nothing of where, when and by how many processes it was made."""

    format_version: int
    settings: dict[str, Any]
    """What, beside the sources and the tokenizer, decides the content."""
    tokenizer_sha256: str
    vocab_size: int = Field(ge=1)
    special_ids: dict[str, int]
    dtype: str
    largest_id: int
    documents: int
    tokens: int
    text_bytes: int
    sources: tuple[SourceEntry, ...]
    xz_bits_per_byte: float | None
    """What `xz -9e` needs for the validation text; None where it was too long to compress."""
    sha256: str = ""
    """Digest of the file up to this key, and so of everything in the folder; known when it was read."""

    def write(self, folder: Path) -> None:
        """Write it into `folder` in one step."""
        write_sealed_json(folder / CORPUS_MANIFEST, self.model_dump(mode="json", exclude={"sha256"}))


def read_corpus_manifest(folder: Path) -> CorpusManifest:
    """Return the manifest of a prepared folder.

    Raises:
        UserError: it is missing, of another format, damaged or changed.
    """
    path = folder / CORPUS_MANIFEST
    remedy = "delete the folder and prepare it again"
    try:
        content = read_sealed_json(path, format_version=CORPUS_FORMAT_VERSION, remedy=remedy)
        return CorpusManifest.model_validate(content)
    except FileNotFoundError:
        raise UserError(f"{folder}: no prepared corpus here; do all machines read the same source?") from None
    except ValueError as error:
        raise UserError(f"{path}: damaged; {remedy}") from error
