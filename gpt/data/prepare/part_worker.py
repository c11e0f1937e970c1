"""The work on one part: digests of its documents, or its shards. `gpt.data.prepare.workers` says which process does it.

All that a worker needs is in the ReadSettings and the Part, both plain values, and all that it leaves behind are files
in the unfinished folder.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from gpt.data.encoders import Ids
from gpt.data.prepare.dedup import count_duplicates, drop_duplicates, has_whole_documents, write_digests
from gpt.data.prepare.documents import Document
from gpt.data.prepare.parts import PART_BYTES, Part, read_part
from gpt.data.prepare.records import MAX_REASON_LETTERS, Records, shorten
from gpt.data.prepare.split import batch_by_size, split
from gpt.data.prepare.unfinished import PartRecord, UnfinishedFolder
from gpt.data.shards import ShardWriter
from gpt.data.tokenizer import Tokenizer
from gpt.data.unrepresented import Unrepresented
from gpt.errors import UserError
from gpt.utils.helper import first_line

Advance = Callable[[int, int], None]
"""Reports progress: bytes of text and tokens since the last call."""
Action = Literal["digests", "shards"]
"""Kind of work on a part."""


@dataclass(frozen=True)
class ReadSettings:
    """Settings by which the documents of every part are read and split."""

    text_field: str
    skip_bad: bool
    """Bad records are left out and counted."""
    val_fraction: float
    corpus_bytes: int
    """Bytes of all sources."""
    deduplicate: bool


def read_splits(
    folder: UnfinishedFolder,
    settings: ReadSettings,
    part: Part,
    records: Records | None = None,
    tokenizer: Tokenizer | None = None,
) -> Iterator[tuple[list[Document], list[Document]]]:
    """Yield the (training, validation) documents of a part, some mebibytes at a time, without duplicates.

    Args:
        folder: holds the mask of duplicates.
        settings: how to read and split.
        part: to read.
        records: counts the bad records that are skipped.
        tokenizer: the tokenizer of a part that holds tokens.
    """
    documents = read_part(part, records or Records(settings.text_field, skip_bad=settings.skip_bad), tokenizer)
    if settings.deduplicate and has_whole_documents(part):
        documents = drop_duplicates(documents, folder.keep_mask_path(part))
    for batch in batch_by_size(documents, PART_BYTES):
        if part.role is None:
            yield split(batch, settings.val_fraction, corpus_size=settings.corpus_bytes)
        else:
            yield ([], batch) if part.role == "val" else (batch, [])


class PartWorker:
    """Does the work, part by part.

    Args:
        folder: path of the unfinished folder.
        settings: how to read and split.
    """

    def __init__(self, folder: Path, settings: ReadSettings):
        self._folder, self._settings = UnfinishedFolder(folder), settings
        self._loaded_tokenizer: Tokenizer | None = None

    def do(self, action: Action, part: Part, advance: Advance) -> None:
        """Do the work on one part; the result is in the folder.

        Raises:
            UserError: a document cannot be read or encoded.
            OSError: the result cannot be written.
        """
        try:
            if action == "digests":
                self._write_digests(part, advance)
            else:
                self._write_shards(part, advance)
        except (UserError, OSError):
            raise
        except MemoryError as error:
            raise UserError(f"{_name_part(part)}: not enough memory; set --data.workers to a smaller number") from error
        except Exception as error:
            what = f"{type(error).__name__}: {shorten(first_line(error), MAX_REASON_LETTERS)}"
            raise UserError(f"{_name_part(part)}: cannot be prepared: {what}") from error

    @property
    def _tokenizer(self) -> Tokenizer | None:
        """The corpus's tokenizer; None before it is learned, as during the search for duplicates."""
        if self._loaded_tokenizer is None:
            self._loaded_tokenizer = self._folder.load_tokenizer()
        return self._loaded_tokenizer

    def _write_digests(self, part: Part, advance: Advance) -> None:
        def documents() -> Iterator[Document]:
            for document in read_part(part, self._new_records(), self._tokenizer):
                yield document
                advance(document.size, 0)

        write_digests(documents(), self._folder.digests_path(part))

    def _write_shards(self, part: Part, advance: Advance) -> None:
        folder, tokenizer, records = self._folder, self._tokenizer, self._new_records()
        assert tokenizer is not None
        vocab_size = tokenizer.vocab_size
        with (
            ShardWriter(folder.shard_path(part, "train"), vocab_size, continues=part.continues) as train,
            ShardWriter(folder.shard_path(part, "val"), vocab_size, continues=part.continues) as val,
        ):
            continues, unrepresented, first_unrepresented = part.continues, 0, ""
            for splits in read_splits(folder, self._settings, part, records, tokenizer):
                for writer, documents in zip((train, val), splits, strict=True):
                    for document in documents:
                        ids, text_bytes, lost = _encode(document, tokenizer)
                        if lost is not None:
                            unrepresented += lost.characters
                            first_unrepresented = first_unrepresented or f"{lost.first} of {document.name}"
                        writer.add(ids, text_bytes, start=None if continues else tokenizer.document_start)
                        advance(text_bytes, len(ids))
                        continues = False
            is_deduplicated = self._settings.deduplicate and has_whole_documents(part)
            record = PartRecord(
                train=train.finish(),
                val=val.finish(),
                skipped_records=records.skipped,
                duplicates=count_duplicates(folder.keep_mask_path(part)) if is_deduplicated else 0,
                skipped_reasons=tuple(records.reasons),
                unrepresented=unrepresented,
                first_unrepresented=first_unrepresented,
            )
        folder.write_record(part, record)

    def _new_records(self) -> Records:
        return Records(self._settings.text_field, skip_bad=self._settings.skip_bad)


def _encode(document: Document, tokenizer: Tokenizer) -> tuple[Ids, int, Unrepresented | None]:
    """Encode a document.

    Raises:
        UserError: the tokenizer cannot encode it; names the document.
    """
    try:
        return document.encode(tokenizer)
    except UserError as error:
        raise UserError(f"{shorten(document.name)}: {error}") from error


def _name_part(part: Part) -> str:
    """Return the place of a part for messages: its file, or the first and the last of several."""
    first, last = part.files[0][1], part.files[-1][1]
    if len(part.files) > 1:
        return f"{shorten(first, 120)} to {shorten(Path(last).name, 60)}"
    where = "" if part.stop is None else f" [{part.start}:{part.stop}]"
    return shorten(first) + where
