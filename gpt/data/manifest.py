"""corpus.json: what a prepared folder holds, with the digest of every part of it and its own."""

import hashlib
import json
from pathlib import Path
from typing import Any

from pydantic import Field, ValidationError

from gpt.configs.base import Config
from gpt.data.shards import ShardInfo
from gpt.errors import UserError
from gpt.utils.atomic_io import write_text

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
        content = json.dumps(self.model_dump(mode="json", exclude={"sha256"}), indent=2).removesuffix("\n}")
        write_text(folder / CORPUS_MANIFEST, f'{content}{_SEAL}{_sha256(content)}"\n}}\n')


def read_corpus_manifest(folder: Path) -> CorpusManifest:
    """The manifest of a prepared folder.

    Raises:
        UserError: it is missing, of another format, damaged or changed.
    """
    path = folder / CORPUS_MANIFEST
    remedy = "delete the folder and prepare it again"
    try:
        text = path.read_text(encoding="utf-8")
        content = json.loads(text)
        if content.get("format_version") != CORPUS_FORMAT_VERSION:
            raise UserError(
                f"{path}: format {content.get('format_version')}, this program's is {CORPUS_FORMAT_VERSION}; {remedy}"
            )
        sealed, _, rest = text.rpartition(_SEAL)
        found = _sha256(sealed)
        if found != content["sha256"]:
            raise UserError(f"{path}: changed: its SHA-256 is {found}, not {content['sha256']}; {remedy}")
        if rest != f'{found}"\n}}\n':
            raise ValueError("a key that follows the digest would replace one that it covers")
        return CorpusManifest.model_validate(content)
    except FileNotFoundError:
        raise UserError(f"{folder}: no prepared corpus here; do all machines read the same source?") from None
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}") from error
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError, ValidationError) as error:
        raise UserError(f"{path}: damaged; {remedy}") from error


_SEAL = ',\n  "sha256": "'


def _sha256(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()
