"""Sources -> a prepared folder: split, tokenized and written once, in constant memory and by several processes.

    sources -> files -> parts -> [duplicates] -> tokenizer -> shards, part by part -> manifest

A preparation works in a folder beside the one asked for, which gets its name when it is complete. If the program is
killed, the next one keeps what is finished there. The result depends on the sources and the settings alone: not on the
number of processes, nor on interruptions.
"""

import logging
import lzma
import shutil
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from gpt.data.corpus_notes import list_notes
from gpt.data.manifest import (
    CORPUS_FORMAT_VERSION,
    CORPUS_MANIFEST,
    CorpusManifest,
    SourceEntry,
)
from gpt.data.prepare.dedup import has_whole_documents, write_keep_masks
from gpt.data.prepare.documents import Document
from gpt.data.prepare.file_state import SourceChangedError, digest_states, require_unchanged
from gpt.data.prepare.learn_tokenizer import LEARNED_KINDS, learn_bpe_tokenizer, learn_char_tokenizer
from gpt.data.prepare.memory import report_memory
from gpt.data.prepare.part_worker import Action, ReadSettings, read_splits
from gpt.data.prepare.parts import Part, cut_into_parts, leave_out_foreign_tokens
from gpt.data.prepare.preparation_plan import PreparationPlan
from gpt.data.prepare.records import Records
from gpt.data.prepare.unfinished import PartRecord, UnfinishedFolder
from gpt.data.prepare.workers import WorkerPool
from gpt.data.shards import choose_token_dtype
from gpt.data.tokenizer import Tokenizer
from gpt.data.tokenizer_builders import build_tokenizer, require_end_of_text
from gpt.errors import UserError
from gpt.utils.atomic_io import fsync, remove_folder
from gpt.utils.folder_lock import hold_lock
from gpt.utils.helper import format_count, format_si, plural, sha256_of_file
from gpt.utils.progress import progress_bar

log = logging.getLogger(__name__)

MAX_XZ_BYTES = 2**21
"""Bytes of validation text above which xz takes longer than its number is worth."""
MIN_SECONDS_TO_REPORT_SPEED = 10
MAX_NAMED_FILES = 3
"""Files that are left out and named."""


def prepare_folder(folder: Path, plan: PreparationPlan, flag: str) -> None:
    """Prepare `folder` unless it is prepared already; one process does it while the others wait.

    Args:
        folder: the folder of the prepared corpus.
        plan: what to prepare, and how.
        flag: names the folder in messages.

    Raises:
        UserError: a source cannot be read, the folder cannot be written, or it holds another unfinished preparation.
    """
    unfinished, lock = (folder.with_name(f".{folder.name}{suffix}") for suffix in (".unfinished", ".lock"))
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with hold_lock(lock):
            if not (folder / CORPUS_MANIFEST).exists():
                _prepare_locked(folder, unfinished, plan)
    except OSError as error:
        if error.filename == str(lock):
            raise UserError(
                f"{flag} {folder}: {lock}: {error.strerror}; delete this file, or name another folder"
            ) from error
        what = error.strerror if isinstance(error, ChildProcessError) else f"cannot be written: {error.strerror}"
        raise UserError(
            f"{flag} {folder}: {what}; run the same command again to resume, or delete {unfinished}"
        ) from error


def _prepare_locked(folder: Path, unfinished: Path, plan: PreparationPlan) -> None:
    """Prepare `folder` in `unfinished`, while this process holds the lock."""
    working_folder = UnfinishedFolder(unfinished)
    working_folder.claim(plan.identity, digest_states(plan.states))
    if folder.exists():  # its manifest was deleted
        remove_folder(folder)
    try:
        _Preparation(working_folder, plan).run()
    except UserError as error:  # a source that the user mends has another fingerprint, and so needs another preparation
        if not plan.is_remote or isinstance(error, SourceChangedError):
            shutil.rmtree(unfinished)
        raise
    unfinished.rename(folder)
    fsync(folder.parent)


class _Preparation:
    """A preparation in its unfinished folder.

    Args:
        folder: claimed for the plan.
        plan: what to prepare, and how.
    """

    def __init__(self, folder: UnfinishedFolder, plan: PreparationPlan):
        self._folder, self._plan = folder, plan
        self._left_out_tokens: dict[str, list[str]] = {}
        self._bad_files: dict[str, Records] = {}
        self._settings = ReadSettings(
            text_field=plan.text_field,
            skip_bad=plan.on_error == "skip",
            val_fraction=plan.val_fraction,
            corpus_bytes=plan.size,
            deduplicate=plan.deduplicate,
        )

    def run(self) -> None:
        """Write everything that a prepared corpus consists of, down to the disk."""
        if not (self._folder.path / CORPUS_MANIFEST).exists():
            n_files = sum(len(source.files) for source in self._plan.sources)
            names, files = ", ".join(self._plan.names), plural(n_files, "file")
            log.info("preparing %s: %s, %s", names, files, format_si(self._plan.size, "B"))
            report_memory(self._plan)
            try:
                self._prepare()
            except SourceChangedError:
                raise
            except UserError:
                require_unchanged(self._plan.states)  # a file that changed may be an error in many ways
                raise
        self._folder.finish()

    def _prepare(self) -> None:
        # The workers start while the tokenizer is built.
        with WorkerPool(self._folder.path, self._settings, self._plan.n_processes) as pool:
            tokenizer = self._build_tokenizer()
            parts_of_sources = self._cut_into_parts(tokenizer)
            self._report_left_out()
            parts = [part for of_source in parts_of_sources for part in of_source]
            self._find_duplicates(pool, parts)
            tokenizer = tokenizer or self._folder.load_or_save_tokenizer(lambda: self._learn_tokenizer(parts))
            self._write_shards(pool, parts)
        self._require_unchanged()
        self._write_manifest(tokenizer, parts_of_sources)

    def _require_unchanged(self) -> None:
        """Check that the sources and the tokenizer's file are still those of the fingerprint.

        Raises:
            SourceChangedError: a file has changed or is gone.
        """
        require_unchanged(self._plan.states)
        path = Path(self._plan.tokenizer)
        if self._plan.tokenizer_file_sha256 and not (
            path.is_file() and sha256_of_file(path) == self._plan.tokenizer_file_sha256
        ):
            raise SourceChangedError(f"{path}: changed while it was used; run the same command again")

    def _report_left_out(self) -> None:
        """Name the first files that are left out, in one line for each source."""
        for name, source in zip(self._plan.names, self._plan.sources, strict=True):
            left_out = (*source.left_out, *self._left_out_tokens[name])
            if left_out:
                shown = ", ".join(left_out[:MAX_NAMED_FILES]) + (", ..." if len(left_out) > MAX_NAMED_FILES else "")
                what = (
                    plural(len(left_out), "file or folder", "")
                    if len(left_out) == 1
                    else f"{len(left_out):,} files or folders"
                )
                log.warning("%s: left out %s: %s", name, what, shown)

    def _build_tokenizer(self) -> Tokenizer | None:
        """Return the tokenizer that the settings name; None if it is learned from the corpus."""
        kind = self._plan.tokenizer
        require_end_of_text(kind, self._plan.end_of_text)
        if kind not in LEARNED_KINDS:
            return self._folder.load_or_save_tokenizer(lambda: build_tokenizer(kind, self._plan.end_of_text))
        for source in self._plan.sources:
            if all(file.kind == "tokens" for file in source.files):
                raise UserError(
                    f"{source.files[0].path} holds tokens, from which no tokenizer can be learned; "
                    "set --data.tokenizer to gpt2 or the tokenizer.json that wrote them"
                )
        return None

    def _cut_into_parts(self, tokenizer: Tokenizer | None) -> list[list[Part]]:
        """Return the parts of each source, numbered through all sources."""
        groups, number = [], 0
        for name, source, role in zip(self._plan.names, self._plan.sources, self._plan.roles, strict=True):
            self._bad_files[name] = records = Records(self._plan.text_field, skip_bad=self._settings.skip_bad)
            for message in source.bad_files:
                records.refuse(message)
            files, self._left_out_tokens[name] = leave_out_foreign_tokens(source.files, tokenizer)
            parts = cut_into_parts(
                files,
                records,
                val_fraction=self._plan.val_fraction,
                role=role,
                tokenizer=tokenizer,
            )
            groups.append([replace(part, number=number + index) for index, part in enumerate(parts)])
            number += len(parts)
        return groups

    def _find_duplicates(self, pool: WorkerPool, parts: Sequence[Part]) -> None:
        """Write, for each part, the mask of the documents that equal none before them."""
        if not self._plan.deduplicate:
            return
        parts = [part for part in parts if has_whole_documents(part)]
        remaining = [part for part in parts if not self._folder.digests_path(part).exists()]
        self._run(pool, "looking for duplicates", "digests", remaining)
        write_keep_masks(
            [self._folder.digests_path(part) for part in parts], [self._folder.keep_mask_path(part) for part in parts]
        )

    def _learn_tokenizer(self, parts: Sequence[Part]) -> Tokenizer:
        if self._plan.tokenizer == "bpe":
            return learn_bpe_tokenizer(parts, self._read_splits, self._plan.vocab_size)
        tokenizer = learn_char_tokenizer(parts, self._read_splits)
        if tokenizer is None:
            raise _no_text_error(", ".join(self._plan.names))
        return tokenizer

    def _read_splits(self, part: Part) -> Iterator[tuple[list[Document], list[Document]]]:
        return read_splits(self._folder, self._settings, part)

    def _write_shards(self, pool: WorkerPool, parts: Sequence[Part]) -> None:
        remaining = [part for part in parts if not self._folder.is_done(part)]
        if 0 < len(remaining) < len(parts):
            log.info("%d of %d parts are prepared already", len(parts) - len(remaining), len(parts))
        self._run(pool, "tokenizing", "shards", remaining)

    def _run(self, pool: WorkerPool, description: str, action: Action, parts: Sequence[Part]) -> None:
        """Do `action` to every part, with a progress bar."""
        started, done = time.perf_counter(), np.zeros(2, dtype=np.int64)
        with progress_bar(description, total=sum(part.size for part in parts)) as advance:

            def count(size: int, tokens: int) -> None:
                done[:] += (size, tokens)
                advance(size, tokens)

            pool.run(action, parts, count)
        seconds = time.perf_counter() - started
        if done[1] and seconds > MIN_SECONDS_TO_REPORT_SPEED:
            log.info("tokenized %s, %s tokens/s", format_si(done[0] / seconds, "B/s"), format_count(done[1] / seconds))

    def _write_manifest(self, tokenizer: Tokenizer, parts_of_sources: Sequence[Sequence[Part]]) -> None:
        entries = []
        for name, source, parts in zip(self._plan.names, self._plan.sources, parts_of_sources, strict=True):
            records = [self._folder.read_record(part) for part in parts]
            bad_files = self._bad_files[name]
            entries.append(_build_source_entry(name, source.sha256, records, bad_files.skipped))
            reasons = (*bad_files.reasons, *(reason for record in records for reason in record.skipped_reasons))
            _report_source(entries[-1], next(iter(reasons), None))
        shards = [shard for entry in entries for shard in entry.shards]
        val_bytes = sum(shard.text_bytes for entry in entries for shard in entry.val)
        manifest = CorpusManifest(
            format_version=CORPUS_FORMAT_VERSION,
            settings=self._plan.settings,
            tokenizer_sha256=tokenizer.sha256,
            vocab_size=tokenizer.vocab_size,
            special_ids=tokenizer.special_ids,
            dtype=np.dtype(choose_token_dtype(tokenizer.vocab_size)).name,
            largest_id=max(shard.largest_id for shard in shards),
            documents=sum(shard.documents for shard in shards),
            tokens=sum(shard.tokens for shard in shards),
            text_bytes=sum(shard.text_bytes for shard in shards),
            sources=tuple(entries),
            xz_bits_per_byte=self._measure_xz_bits_per_byte(
                [part for parts in parts_of_sources for part in parts], val_bytes
            ),
        )
        for note in list_notes(manifest):
            log.warning("%s", note)
        manifest.write(self._folder.path)

    def _measure_xz_bits_per_byte(self, parts: Sequence[Part], val_bytes: int) -> float | None:
        """Return the bits per byte of `xz -9e` on the validation texts as one stream, to compare a model with.

        None if there is no text, or more than MAX_XZ_BYTES, or if it would have to be decoded or downloaded.
        """
        has_local_text = all(part.kind not in ("tokens", "hub") for part in parts)
        if not (has_local_text and 0 < val_bytes <= MAX_XZ_BYTES):
            return None
        compressor = lzma.LZMACompressor(preset=9 | lzma.PRESET_EXTREME)
        compressed = text_bytes = 0
        for part in (part for part in parts if part.role != "train"):
            for _, val in self._read_splits(part):
                for content in (document.content for document in val):
                    compressed += len(compressor.compress(content))
                    text_bytes += len(content)
        return 8 * (compressed + len(compressor.flush())) / text_bytes


def _build_source_entry(name: str, sha256: str, records: Sequence[PartRecord], n_bad_files: int) -> SourceEntry:
    return SourceEntry(
        name=name,
        sha256=sha256,
        train=tuple(record.train for record in records if record.train is not None),
        val=tuple(record.val for record in records if record.val is not None),
        skipped_records=n_bad_files + sum(record.skipped_records for record in records),
        duplicates=sum(record.duplicates for record in records),
        unrepresented=sum(record.unrepresented for record in records),
        first_unrepresented=next((record.first_unrepresented for record in records if record.unrepresented), ""),
    )


def _report_source(entry: SourceEntry, bad_record: str | None) -> None:
    """Log what a source has lost.

    Args:
        entry: what became of the source.
        bad_record: fault of its first bad record; None if all are good.

    Raises:
        UserError: it has no text, or none that the tokenizer has tokens for.
    """
    has_text = any(shard.text_bytes for shard in entry.shards)
    if entry.unrepresented and not has_text:
        raise UserError(
            f"{entry.name}: the tokenizer has no token for any of its {entry.unrepresented} characters, first "
            f"{entry.first_unrepresented}; use a tokenizer with all bytes, such as --data.tokenizer bpe"
        )
    if not has_text and not entry.duplicates:
        raise _no_text_error(entry.name, bad_record)
    if bad_record:
        log.warning("%s: first bad record: %s", entry.name, bad_record)
    if entry.skipped_records:
        log.warning("%s: left out %s", entry.name, plural(entry.skipped_records, "bad record"))
    if entry.duplicates:
        log.info("%s: left out %s", entry.name, plural(entry.duplicates, "duplicate"))


def _no_text_error(name: str, reason: str | None = None) -> UserError:
    because = f" ({reason})" if reason else ""
    return UserError(f"{name}: no document has any text{because}; name a source with text in it")
