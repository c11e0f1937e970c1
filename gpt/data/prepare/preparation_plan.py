"""Plan of a preparation: its sources, found and fingerprinted, and every setting that decides the result."""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from gpt.configs.data_config import TOKENIZER_KINDS, PreparationConfig
from gpt.data.manifest import CORPUS_FORMAT_VERSION
from gpt.data.prepare.file_state import FileState
from gpt.data.prepare.formats import RECORD_KINDS
from gpt.data.prepare.parts import PART_BYTES, Role
from gpt.data.prepare.records import join, shorten
from gpt.data.prepare.sources import Source, find_source
from gpt.errors import UserError
from gpt.machine.resources import usable_cores
from gpt.utils.helper import sha256_of_file, unique_names


@dataclass(frozen=True)
class PreparationPlan:
    """The sources of a preparation, found and fingerprinted, and how to prepare them."""

    sources: tuple[Source, ...]
    roles: tuple[Role | None, ...]
    """Split that each source belongs to; None holds out some of its documents."""
    tokenizer: str
    """byte, char, bpe, gpt2, or the path of a tokenizer.json."""
    tokenizer_file_sha256: str | None
    """Digest of the tokenizer.json; None without one."""
    end_of_text: str | None
    """Name of the token that separates documents; None: found by its name."""
    vocab_size: int
    """Size that bpe is trained to."""
    text_field: str
    on_error: Literal["raise", "skip"]
    val_fraction: float
    deduplicate: bool
    n_workers: int
    """Processes at most; does not change the result."""

    @property
    def settings(self) -> dict[str, Any]:
        """All that decides the content of the folder, besides the sources."""
        settings = {
            "tokenizer": self.tokenizer_file_sha256 or self.tokenizer,
            "text_field": self.text_field,
            "on_error": self.on_error,
            "val_fraction": self.val_fraction,
            "deduplicate": self.deduplicate,
        }
        settings |= {"end_of_text": self.end_of_text} if self.end_of_text is not None else {}
        return settings | ({"vocab_size": self.vocab_size} if self.tokenizer == "bpe" else {})

    @property
    def names(self) -> list[str]:
        """Unique names of the sources."""
        return unique_names(source.name for source in self.sources)

    @property
    def identity(self) -> dict[str, Any]:
        """Everything that decides the content of the folder."""
        digests = [[source.sha256, role or "both"] for source, role in zip(self.sources, self.roles, strict=True)]
        return {"format": CORPUS_FORMAT_VERSION, "names": self.names, "sources": digests, "settings": self.settings}

    @property
    def key(self) -> str:
        """Name of the folder in a cache."""
        return hashlib.sha256(json.dumps(self.identity, sort_keys=True).encode()).hexdigest()[:20]

    @property
    def size(self) -> int:
        """Bytes of all files."""
        return sum(file.size for source in self.sources for file in source.files)

    @property
    def n_processes(self) -> int:
        """Processes that do the work: no more than parts, if the sizes of the files give their number."""
        if any(file.kind in ("dataset", "hub") for source in self.sources for file in source.files):
            return self.n_workers
        return max(1, min(self.n_workers, -(-self.size // PART_BYTES)))

    @property
    def states(self) -> list[FileState]:
        """State of every file when it was fingerprinted."""
        return [state for source in self.sources for state in source.states]

    @property
    def is_remote(self) -> bool:
        """True if reading may fail for a while although nothing is wrong with the sources."""
        return any(file.kind == "hub" for source in self.sources for file in source.files)


def plan_preparation(sources: Sequence[str], config: PreparationConfig) -> PreparationPlan:
    """Find and fingerprint the sources.

    Raises:
        UserError: a source is missing, empty or unreadable.
    """
    train_role: Role | None = None if config.val_fraction and not config.val_source else "train"

    def find(source: str, flag: str) -> Source:
        skip_bad = config.on_error == "skip"
        return find_source(source, flag, config.cache_dir, text_field=config.text_field, skip_bad=skip_bad)

    found = [(find(source, "--data.source"), train_role) for source in sources]
    found += [(find(source, "--data.val-source"), "val") for source in config.val_source]
    _require_records(config.text_field, [source for source, _ in found])
    tokenizer_file = Path(config.tokenizer)
    names_file = config.tokenizer not in TOKENIZER_KINDS and tokenizer_file.is_file()
    return PreparationPlan(
        sources=tuple(source for source, _ in found),
        roles=tuple(role for _, role in found),
        tokenizer=config.tokenizer,
        tokenizer_file_sha256=sha256_of_file(tokenizer_file) if names_file else None,
        end_of_text=config.end_of_text,
        vocab_size=config.vocab_size,
        text_field=config.text_field,
        on_error=config.on_error,
        val_fraction=0.0 if config.val_source else config.val_fraction,
        deduplicate=config.deduplicate,
        n_workers=config.workers or usable_cores(),
    )


def _require_records(text_field: str, sources: Sequence[Source]) -> None:
    """Check that a text field that was named has records to be found in.

    Raises:
        UserError: no source has any.
    """
    has_records = any(file.kind in RECORD_KINDS for source in sources for file in source.files)
    if not has_records and text_field != PreparationConfig().text_field:
        names = join(source.name for source in sources)
        raise UserError(
            f"--data.text-field {shorten(text_field)}: {names} holds no records, only text or tokens; "
            "leave out the flag, or name JSON, CSV or Parquet files"
        )
