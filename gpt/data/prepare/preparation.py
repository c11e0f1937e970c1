"""Sources -> a prepared folder: split, tokenized and written once, in constant memory and by several processes.

    sources -> files -> tokenizer -> parts -> shards, part by part -> manifest

All is done in a folder beside the one asked for, which gets its name when it is complete. What is finished there is
kept when the program is killed, and not done again. The result depends on the sources and the settings alone: not on
the number of processes, nor on interruptions.
"""

import hashlib
import json
import logging
import lzma
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import ValidationError

from gpt.configs.data_config import PreparationConfig
from gpt.data.manifest import CORPUS_FORMAT_VERSION, CORPUS_MANIFEST, TOKENIZER_FILE, CorpusManifest, SourceEntry
from gpt.data.prepare.documents import Document, TextDocument
from gpt.data.prepare.formats import is_compressed
from gpt.data.prepare.part_worker import (
    RECORDS,
    Action,
    Job,
    PartRecord,
    is_deduplicated,
    kept_documents,
    split_batches,
    write_bytes,
)
from gpt.data.prepare.parts import PART_BYTES, Part, Role, cut_into_parts
from gpt.data.prepare.sources import Source, find_source
from gpt.data.prepare.workers import WorkerPool
from gpt.data.shards import ShardInfo, token_dtype
from gpt.data.tokenizer import Tokenizer
from gpt.data.tokenizer_builders import build_char_tokenizer, build_tokenizer, train_bpe_tokenizer
from gpt.errors import UserError
from gpt.machine.resources import usable_cores
from gpt.utils.atomic_io import fsync, remove_folder, write_json, write_text
from gpt.utils.folder_lock import hold_lock
from gpt.utils.helper import format_si, plural, unique_names
from gpt.utils.progress import progress_bar

log = logging.getLogger(__name__)

SAMPLE_BYTES = 2**26
"""Bytes of text that bpe is trained on: all of a small corpus, a sample from everywhere of a large one."""
XZ_LIMIT = 2**21
"""Bytes of validation text above which xz would keep the user waiting for longer than the number is worth."""
IDENTITY = "preparation.json"


@dataclass(frozen=True)
class Found:
    """The sources of a preparation, looked at."""

    sources: tuple[Source, ...]
    roles: tuple[Role | None, ...]
    """Where each goes; None: some of its documents are held out."""
    settings: dict[str, Any]

    @property
    def names(self) -> list[str]:
        """The sources' names, each once."""
        return unique_names(source.name for source in self.sources)

    @property
    def identity(self) -> dict[str, Any]:
        """What decides the content of the prepared folder."""
        digests = [[source.sha256, role or "both"] for source, role in zip(self.sources, self.roles, strict=True)]
        return {"format": CORPUS_FORMAT_VERSION, "names": self.names, "sources": digests, "settings": self.settings}

    @property
    def is_remote(self) -> bool:
        """Whether reading may fail for a while without anything being wrong with what is read."""
        return any(file.kind == "hub" for source in self.sources for file in source.files)

    @property
    def key(self) -> str:
        """A name for it."""
        return hashlib.sha256(json.dumps(self.identity, sort_keys=True).encode()).hexdigest()[:20]


def find(sources: Sequence[str], config: PreparationConfig) -> Found:
    """Look at what is to be prepared.

    Raises:
        UserError: a source is missing, empty or unreadable.
    """
    training: Role | None = None if config.val_fraction and not config.val_source else "train"
    found = [(find_source(source), training) for source in sources]
    found += [(find_source(source, "--data.val-source"), "val") for source in config.val_source]
    settings: dict[str, Any] = {
        "tokenizer": config.tokenizer,
        "text_field": config.text_field,
        "on_error": config.on_error,
        "val_fraction": 0.0 if config.val_source else config.val_fraction,
        "deduplicate": config.deduplicate,
    }
    if config.tokenizer == "bpe":
        settings["vocab_size"] = config.vocab_size
    elif Path(config.tokenizer).is_file():
        settings["tokenizer"] = hashlib.sha256(Path(config.tokenizer).read_bytes()).hexdigest()
    return Found(tuple(source for source, _ in found), tuple(role for _, role in found), settings)


def prepare_into(folder: Path, found: Found, config: PreparationConfig, flag: str) -> None:
    """Make `folder`, unless it is there; one process does it while the others wait.

    Args:
        folder: of the prepared corpus.
        found: what to prepare.
        config: how.
        flag: names the folder in messages.

    Raises:
        UserError: a source cannot be read, the folder not written, or what is unfinished there is something else.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    with hold_lock(folder.with_name(f".{folder.name}.lock")):
        if (folder / CORPUS_MANIFEST).exists():
            return
        unfinished = folder.with_name(f".{folder.name}.unfinished")
        try:
            if folder.exists():  # somebody deleted its manifest
                remove_folder(folder)
            preparation = _Preparation(unfinished, found, config)
            preparation.claim()
            try:
                preparation.run()
            except UserError:  # once its source is mended it is another preparation
                if not found.is_remote:
                    shutil.rmtree(unfinished)
                raise
            unfinished.rename(folder)
            fsync(folder.parent)
        except OSError as error:
            what = error.strerror if isinstance(error, ChildProcessError) else f"cannot be written: {error.strerror}"
            raise UserError(
                f"{flag} {folder}: {what}; the same command goes on where this one ended, or delete {unfinished}"
            ) from error


class _Preparation:
    """One preparation in its unfinished folder."""

    def __init__(self, folder: Path, found: Found, config: PreparationConfig):
        self._folder, self._found, self._config = folder, found, config
        self._workers = config.workers or usable_cores()
        self._job = Job(
            folder=str(folder),
            text_field=config.text_field,
            skip_bad=config.on_error == "skip",
            val_fraction=config.val_fraction,
            size=sum(file.size for source in found.sources for file in source.files),
            deduplicate=config.deduplicate,
        )

    def claim(self) -> None:
        """Make the folder, or find what was done in it.

        Raises:
            UserError: what was begun there is another preparation.
        """
        identity = self._folder / IDENTITY
        if not identity.exists():
            shutil.rmtree(self._folder, ignore_errors=True)  # killed before it said what it was, or just before its end
            (self._folder / RECORDS).mkdir(parents=True)
            write_json(identity, self._found.identity)
        elif json.loads(identity.read_text(encoding="utf-8")) != self._found.identity:
            raise UserError(
                f"{self._folder} holds an unfinished preparation of other sources or settings; "
                "finish it with the same command, or delete it"
            )

    def run(self) -> None:
        """Leave in the folder what a prepared corpus consists of, all of it on the disk."""
        if not (self._folder / CORPUS_MANIFEST).exists():
            log.info("preparing %s: %s, %sB", *self._size())
            with WorkerPool(self._job, self._n_workers()) as pool:  # they start while the tokenizer is built
                given = self._given_tokenizer()
                parts = [self._parts_of(source, role, given) for source, role in self._in_turn()]
                tasks = list(enumerate(part for group in parts for part in group))
                if self._config.deduplicate:
                    self._find_duplicates(pool, tasks)
                tokenizer = given or self._saved(lambda: self._learn_tokenizer(tasks))
                self._make_shards(pool, tasks)
            self._finish(tokenizer, parts, tasks)
        shutil.rmtree(self._folder / RECORDS, ignore_errors=True)
        for file in self._folder.iterdir():
            if file.suffix in (".tokens", ".tmp"):  # of a worker that was killed
                file.unlink()
            else:
                fsync(file)
        (self._folder / IDENTITY).unlink()  # the last: without it nobody knows what else is here
        fsync(self._folder)

    def _n_workers(self) -> int:
        """As many as are wanted, and no more than there will be parts, where files tell."""
        files = [file for source in self._found.sources for file in source.files]
        if any(file.kind in ("dataset", "hub") for file in files):
            return self._workers
        return min(self._workers, -(-self._job.size // PART_BYTES))

    def _in_turn(self) -> Iterator[tuple[Source, Role | None]]:
        return zip(self._found.sources, self._found.roles, strict=True)

    def _size(self) -> tuple[str, str, str]:
        files = [file for source in self._found.sources for file in source.files]
        return ", ".join(self._found.names), plural(len(files), "file"), format_si(sum(f.size for f in files))

    def _parts_of(self, source: Source, role: Role | None, tokenizer: Tokenizer | None) -> list[Part]:
        fraction = self._config.val_fraction
        return cut_into_parts(source.files, self._job.records(), val_fraction=fraction, role=role, tokenizer=tokenizer)

    def _documents(self, index: int, part: Part) -> Iterator[tuple[list[Document], list[Document]]]:
        """(training, validation) documents of a part, as its worker has them."""
        return split_batches(self._job, part, kept_documents(self._job, index, part, self._job.records(), None)[0])

    def _saved(self, build: Callable[[], Tokenizer]) -> Tokenizer:
        path = self._folder / TOKENIZER_FILE
        if path.exists():
            return Tokenizer.from_file(path)
        tokenizer = build()
        write_text(path, tokenizer.definition)
        return tokenizer

    def _given_tokenizer(self) -> Tokenizer | None:
        """The tokenizer that is asked for; None if it is to be learnt."""
        kind = self._config.tokenizer
        if kind not in ("char", "bpe"):
            return self._saved(lambda: build_tokenizer(kind))
        for file in (file for source in self._found.sources for file in source.files):
            if file.kind == "tokens":
                raise UserError(
                    f"{file.path} holds tokens, of which no tokenizer can be learnt; "
                    "name theirs: --data.tokenizer gpt2, or a tokenizer.json"
                )
        return None

    def _learn_tokenizer(self, tasks: Sequence[tuple[int, Part]]) -> Tokenizer:
        if self._config.tokenizer == "char":
            return self._char_tokenizer(tasks)
        total = min(SAMPLE_BYTES, sum(part.size for _, part in tasks))
        with progress_bar("learning the tokenizer", total) as advance:
            return train_bpe_tokenizer(_with_progress(self._sample(tasks), advance), self._config.vocab_size)

    def _char_tokenizer(self, tasks: Sequence[tuple[int, Part]]) -> Tokenizer:
        """Every character of the corpus; end-of-text too, if either split has several documents to separate."""
        characters: set[str] = set()
        counts = [0, 0]
        with progress_bar("finding the characters", total=sum(part.size for _, part in tasks)) as advance:
            for number, part in tasks:
                for split in self._documents(number, part):
                    for index, documents in enumerate(split):
                        counts[index] += 0 if part.continues else len(documents)
                        for document in documents:
                            assert isinstance(document, TextDocument)
                            characters.update(document.text)
                            advance(document.size, 0)
        if not characters:
            raise UserError(_no_text(", ".join(self._found.names)))
        return build_char_tokenizer(characters, has_documents=max(counts) > 1)

    def _sample(self, tasks: Sequence[tuple[int, Part]]) -> Iterator[str]:
        """Training texts: all, or the beginnings of parts so that together they make up SAMPLE_BYTES."""
        tasks = [(index, part) for index, part in tasks if part.role != "val"]
        each = max(2**20, SAMPLE_BYTES // max(1, len(tasks)))
        chosen = tasks[:: max(1, -(-len(tasks) * each // SAMPLE_BYTES))]
        unlimited = sum(part.size for _, part in tasks) <= SAMPLE_BYTES and all(_tells_size(part) for _, part in tasks)
        for index, part in chosen:
            taken = 0
            for train, _ in self._documents(index, part):
                for document in train:
                    assert isinstance(document, TextDocument)
                    taken += document.size
                    yield document.text if unlimited else document.text[:each]
                    if taken >= each and not unlimited:
                        break
                if taken >= each and not unlimited:
                    break

    def _find_duplicates(self, pool: WorkerPool, tasks: Sequence[tuple[int, Part]]) -> None:
        """Of documents that are equal the first is kept, in the order of the sources."""
        tasks = [(index, part) for index, part in tasks if is_deduplicated(part)]
        todo = [(index, part) for index, part in tasks if not self._job.digests_path(index).exists()]
        self._run(pool, "looking for duplicates", "digests", todo)
        digests = [np.fromfile(self._job.digests_path(index), np.uint64).reshape(-1, 2) for index, _ in tasks]
        together = np.concatenate([np.zeros((0, 2), np.uint64), *digests])
        order = np.lexsort((together[:, 0], together[:, 1]))  # stable: equal ones stay in the order of the documents
        repeats = (together[order[1:]] == together[order[:-1]]).all(axis=1)
        kept = np.ones(len(together), dtype=np.bool_)
        kept[order[1:][repeats]] = False
        start = 0
        for (index, _), digest in zip(tasks, digests, strict=True):
            write_bytes(self._job.kept_path(index), kept[start : start + len(digest)])
            start += len(digest)

    def _make_shards(self, pool: WorkerPool, tasks: Sequence[tuple[int, Part]]) -> None:
        todo = [(index, part) for index, part in tasks if not self._is_done(index)]
        if 0 < len(todo) < len(tasks):
            log.info("%d of %d parts are prepared already", len(tasks) - len(todo), len(tasks))
        self._run(pool, "tokenizing", "shards", todo)

    def _run(self, pool: WorkerPool, what: str, action: Action, tasks: Sequence[tuple[int, Part]]) -> None:
        started, done = time.perf_counter(), np.zeros(2, dtype=np.int64)
        with progress_bar(what, total=sum(part.size for _, part in tasks)) as advance:

            def count(size: int, tokens: int) -> None:
                done[:] += (size, tokens)
                advance(size, tokens)

            pool.run(action, tasks, count)
        seconds = time.perf_counter() - started
        if done[1] and seconds > 10:
            log.info("tokenized %sB/s, %s tokens/s", format_si(done[0] / seconds), format_si(done[1] / seconds))

    def _record(self, index: int) -> PartRecord:
        return PartRecord.model_validate_json(self._job.record_path(index).read_text(encoding="utf-8"))

    def _is_done(self, index: int) -> bool:
        try:
            record = self._record(index)
            shards = [shard for shard in (record.train, record.val) if shard]
            return all((self._folder / shard.file).stat().st_size == shard.size for shard in shards)
        except (OSError, ValidationError):
            return False

    def _finish(self, tokenizer: Tokenizer, parts: Sequence[Sequence[Part]], tasks: Sequence[tuple[int, Part]]) -> None:
        entries, rest = [], iter([self._record(index) for index, _ in tasks])
        for source, name, group in zip(self._found.sources, self._found.names, parts, strict=True):
            entries.append(_source_entry(name, source.sha256, [next(rest) for _ in group]))
        for entry in entries:
            if not any(shard.text_bytes for shard in (*entry.train, *entry.val)) and not entry.duplicates:
                raise UserError(_no_text(entry.name))
            if entry.skipped_records:
                log.warning("%s: left out %s", entry.name, plural(entry.skipped_records, "bad record"))
            if entry.duplicates:
                log.info("%s: left out %s", entry.name, plural(entry.duplicates, "duplicate"))
        shards = [shard for entry in entries for shard in (*entry.train, *entry.val)]
        CorpusManifest(
            format_version=CORPUS_FORMAT_VERSION,
            settings=self._found.settings,
            tokenizer_sha256=tokenizer.sha256,
            vocab_size=tokenizer.vocab_size,
            special_ids=tokenizer.special_ids,
            dtype=np.dtype(token_dtype(tokenizer.vocab_size)).name,
            largest_id=max(shard.largest_id for shard in shards),
            documents=sum(shard.documents for shard in shards),
            tokens=sum(shard.tokens for shard in shards),
            text_bytes=sum(shard.text_bytes for shard in shards),
            sources=tuple(entries),
            xz_bits_per_byte=self._xz_bits_per_byte(entries, tasks),
        ).write(self._folder)

    def _xz_bits_per_byte(self, entries: Sequence[SourceEntry], tasks: Sequence[tuple[int, Part]]) -> float | None:
        """Bits per byte of `xz -9e` on the validation texts as one stream: what a compressor has without learning."""
        size = sum(shard.text_bytes for entry in entries for shard in entry.val)
        is_simple = all(part.kind not in ("tokens", "hub") for _, part in tasks)
        if not (is_simple and 0 < size <= XZ_LIMIT):
            return None
        compressor = lzma.LZMACompressor(preset=9 | lzma.PRESET_EXTREME)
        compressed = 0
        for index, part in ((index, part) for index, part in tasks if part.role != "train"):
            for _, val in self._documents(index, part):
                compressed += sum(len(compressor.compress(document.content)) for document in val)
        return 8 * (compressed + len(compressor.flush())) / size


def _source_entry(name: str, sha256: str, records: Sequence[PartRecord]) -> SourceEntry:
    def shards(found: Iterator[ShardInfo | None]) -> tuple[ShardInfo, ...]:
        return tuple(shard for shard in found if shard is not None)

    return SourceEntry(
        name=name,
        sha256=sha256,
        train=shards(record.train for record in records),
        val=shards(record.val for record in records),
        skipped_records=sum(record.skipped_records for record in records),
        duplicates=sum(record.duplicates for record in records),
    )


def _no_text(name: str) -> str:
    return f"{name}: no document has any text; name a source with text in it"


def _tells_size(part: Part) -> bool:
    """Whether the part's size is that of its texts."""
    return part.size > 0 and not any(is_compressed(Path(path)) for _, path in part.files)


def _with_progress(texts: Iterator[str], advance: Any) -> Iterator[str]:
    for text in texts:
        yield text
        advance(len(text), 0)
