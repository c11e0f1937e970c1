"""The work on one part: digests of its documents, or its shards. `gpt.data.prepare.workers` says which process does it.

All that a worker needs is in the Job and the Part, both plain values, and all that it leaves behind are files in the
unfinished folder. A part is done when its record is written, after its shards.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from pydantic import ValidationError

from gpt.configs.base import Config
from gpt.data.manifest import TOKENIZER_FILE
from gpt.data.prepare.dedup import count_duplicates, drop_duplicates, has_whole_documents, write_digests
from gpt.data.prepare.documents import Document
from gpt.data.prepare.formats import Records
from gpt.data.prepare.parts import PART_BYTES, Part, read_part
from gpt.data.prepare.split import batched, split
from gpt.data.shards import ShardInfo, ShardWriter
from gpt.data.tokenizer import Tokenizer
from gpt.utils.atomic_io import write_text

Advance = Callable[[int, int], None]
"""Reports progress: bytes of text and tokens since the last call."""
Action = Literal["digests", "shards"]
"""Kind of work on a part."""

PARTS_FOLDER = "parts"
"""Subfolder of an unfinished corpus for records, digests and masks of parts."""


class PartRecord(Config):
    """Result of a part, written when its shards are on the disk."""

    train: ShardInfo | None
    val: ShardInfo | None
    skipped_records: int
    duplicates: int


@dataclass(frozen=True)
class Job:
    """What all parts of a preparation have in common."""

    folder: str
    """The unfinished corpus."""
    text_field: str
    skip_bad: bool
    """Bad records are left out and counted."""
    val_fraction: float
    corpus_bytes: int
    """Bytes of all sources."""
    deduplicate: bool

    def new_records(self) -> Records:
        """Return the settings of a reader, with a count of its own."""
        return Records(self.text_field, skip_bad=self.skip_bad)

    def shard_path(self, part: Part, role: Literal["train", "val"]) -> Path:
        """Return the path of a part's shard."""
        return Path(self.folder) / f"{role}-{part.number:06d}.safetensors"

    def record_path(self, part: Part) -> Path:
        """Return the path of a part's record."""
        return Path(self.folder) / PARTS_FOLDER / f"{part.number:06d}.json"

    def digests_path(self, part: Part) -> Path:
        """Return the path of the digests of a part's documents."""
        return Path(self.folder) / PARTS_FOLDER / f"{part.number:06d}.digests"

    def keep_mask_path(self, part: Part) -> Path:
        """Return the path of the mask of a part's documents that are no duplicates."""
        return Path(self.folder) / PARTS_FOLDER / f"{part.number:06d}.kept"

    def is_deduplicated(self, part: Part) -> bool:
        """Return whether duplicates are left out of a part."""
        return self.deduplicate and has_whole_documents(part)

    def read_record(self, part: Part) -> PartRecord:
        """Read the record of a part that is done."""
        return PartRecord.model_validate_json(self.record_path(part).read_text(encoding="utf-8"))

    def is_done(self, part: Part) -> bool:
        """Return whether a part has a record and the shards that it names."""
        try:
            record = self.read_record(part)
            shards = [shard for shard in (record.train, record.val) if shard]
            return all((Path(self.folder) / shard.file).stat().st_size == shard.size for shard in shards)
        except (OSError, ValidationError):
            return False


def read_splits(
    job: Job, part: Part, records: Records | None = None, tokenizer: Tokenizer | None = None
) -> Iterator[tuple[list[Document], list[Document]]]:
    """Yield the (training, validation) documents of a part, some mebibytes at a time, without duplicates.

    Args:
        job: what all parts have in common.
        part: to read.
        records: counts the bad records that are skipped.
        tokenizer: of a part that holds tokens.
    """
    documents = read_part(part, records or job.new_records(), tokenizer)
    if job.is_deduplicated(part):
        documents = drop_duplicates(documents, job.keep_mask_path(part))
    for batch in batched(documents, PART_BYTES):
        if part.role is None:
            yield split(batch, job.val_fraction, corpus_size=job.corpus_bytes)
        else:
            yield ([], batch) if part.role == "val" else (batch, [])


class PartWorker:
    """Does the work of a job, part by part.

    Args:
        job: what all parts have in common.
    """

    def __init__(self, job: Job):
        self._job = job
        self._loaded_tokenizer: Tokenizer | None = None

    def do(self, action: Action, part: Part, advance: Advance) -> None:
        """Do the work on one part; the result is in the folder.

        Raises:
            UserError: a document cannot be read or encoded.
            OSError: the result cannot be written.
        """
        if action == "digests":
            self._write_digests(part, advance)
        else:
            self._write_shards(part, advance)

    @property
    def _tokenizer(self) -> Tokenizer | None:
        """The corpus's tokenizer; None before it is learned, as during the search for duplicates."""
        path = Path(self._job.folder) / TOKENIZER_FILE
        if self._loaded_tokenizer is None and path.exists():
            self._loaded_tokenizer = Tokenizer.from_file(path)
        return self._loaded_tokenizer

    def _write_digests(self, part: Part, advance: Advance) -> None:
        def documents() -> Iterator[Document]:
            for document in read_part(part, self._job.new_records(), self._tokenizer):
                yield document
                advance(document.size, 0)

        write_digests(documents(), self._job.digests_path(part))

    def _write_shards(self, part: Part, advance: Advance) -> None:
        job, tokenizer = self._job, self._tokenizer
        assert tokenizer is not None
        records = job.new_records()
        vocab_size = tokenizer.vocab_size
        with (
            ShardWriter(job.shard_path(part, "train"), vocab_size, continues=part.continues) as train,
            ShardWriter(job.shard_path(part, "val"), vocab_size, continues=part.continues) as val,
        ):
            continues = part.continues
            for splits in read_splits(job, part, records, tokenizer):
                for writer, documents in zip((train, val), splits, strict=True):
                    for document in documents:
                        ids, text_bytes = document.encode(tokenizer)
                        writer.add(ids, text_bytes, start=None if continues else tokenizer.document_start)
                        advance(text_bytes, len(ids))
                        continues = False
            record = PartRecord(
                train=train.finish(),
                val=val.finish(),
                skipped_records=records.skipped,
                duplicates=count_duplicates(job.keep_mask_path(part)) if job.is_deduplicated(part) else 0,
            )
        write_text(job.record_path(part), record.model_dump_json())
