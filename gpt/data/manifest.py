"""corpus.json: the manifest of a prepared folder, with the digests of all its files and of itself."""

import hashlib
import json
from pathlib import Path
from typing import Any

from pydantic import Field

from gpt.configs.base import Config
from gpt.data.shards import ShardInfo
from gpt.errors import UserError
from gpt.utils.sealed_json import read_sealed_json, write_sealed_json

CORPUS_FORMAT_VERSION = 2
CORPUS_MANIFEST = "corpus.json"


class SourceEntry(Config):
    """A source and the shards that it became."""

    name: str
    sha256: str
    """Digest of the names and contents of its files."""
    train: tuple[ShardInfo, ...]
    val: tuple[ShardInfo, ...]
    skipped_records: int = 0
    duplicates: int = 0
    """Documents left out because an equal one comes before them."""
    unrepresented: int = 0
    """Characters that the tokenizer has no token for; `text_bytes` leaves them out."""
    first_unrepresented: str = ""
    """First of them, and its place."""

    @property
    def shards(self) -> tuple[ShardInfo, ...]:
        """Shards of both splits."""
        return (*self.train, *self.val)


class CorpusManifest(Config):
    """Content of a prepared folder. It does not depend on where, when or by how many processes it was prepared."""

    format_version: int
    settings: dict[str, Any]
    """Settings of the preparation that decide the content."""
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
    """Bits per byte of the validation text under `xz -9e`; None if it was too long to compress."""
    sha256: str = ""
    """Digest of the file up to this key, and so of everything in the folder; empty until it is read."""

    @property
    def shards(self) -> list[ShardInfo]:
        """Shards of all sources."""
        return [shard for source in self.sources for shard in source.shards]

    @property
    def content_sha256(self) -> str:
        """Digest of the tokenizer and of the tokens of every source, in order; names of files do not change it."""
        shards = [[[shard.sha256 for shard in split] for split in (entry.train, entry.val)] for entry in self.sources]
        return hashlib.sha256(json.dumps([self.tokenizer_sha256, shards]).encode()).hexdigest()

    @property
    def vocab_note(self) -> str | None:
        """Note on a learned vocabulary that is smaller than the one asked for; None if it is not."""
        asked = self.settings.get("vocab_size")
        if asked is None or self.vocab_size >= asked:
            return None
        return f"vocabulary {self.vocab_size:,} of {asked:,} asked: the text has no more merges"

    def write(self, folder: Path) -> None:
        """Write the manifest into `folder` in one step."""
        content = self.model_dump(mode="json", exclude={"sha256"})
        for source in content["sources"]:
            if not source["unrepresented"]:  # so that a corpus has the digest that it has always had
                del source["unrepresented"], source["first_unrepresented"]
        write_sealed_json(folder / CORPUS_MANIFEST, content)


def read_corpus_manifest(folder: Path) -> CorpusManifest:
    """Return the manifest of a prepared folder.

    Raises:
        UserError: the manifest is missing, of another format, damaged or changed.
    """
    path = folder / CORPUS_MANIFEST
    remedy = "delete the folder and prepare it again"
    try:
        content = read_sealed_json(path, format_version=CORPUS_FORMAT_VERSION, remedy=remedy)
        return CorpusManifest.model_validate(content)
    except FileNotFoundError:
        raise UserError(
            f"{folder}: no prepared corpus here; run gpt prepare, or give this machine the same folder as the others"
        ) from None
    except ValueError as error:
        raise UserError(f"{path}: damaged; {remedy}") from error
