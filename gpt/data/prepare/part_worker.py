"""One part -> shards, and the program that a worker process runs: see `gpt.data.prepare.workers`."""

import contextlib
import hashlib
import json
import os
import queue
import sys
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from gpt.configs.base import Config
from gpt.data.manifest import TOKENIZER_FILE
from gpt.data.prepare.documents import Document
from gpt.data.prepare.formats import Records
from gpt.data.prepare.parts import PART_BYTES, Part, read_part
from gpt.data.prepare.split import batched, split
from gpt.data.shards import ShardInfo, ShardWriter
from gpt.data.tokenizer import Tokenizer
from gpt.errors import UserError
from gpt.utils.atomic_io import write_text

Advance = Callable[[int, int], None]
"""Told of the bytes of text and the tokens that were done since the last call."""
Action = Literal["digests", "shards"]

RECORDS = "parts"
"""Subfolder of an unfinished corpus: what is finished of it."""


class PartRecord(Config):
    """What became of a part; written when its shards are on the disk."""

    train: ShardInfo | None
    val: ShardInfo | None
    skipped_records: int
    duplicates: int


@dataclass(frozen=True)
class Job:
    """What every part of a preparation has in common."""

    folder: str
    """The unfinished corpus; holds its tokenizer.json."""
    text_field: str
    skip_bad: bool
    val_fraction: float
    size: int
    """Bytes of all sources."""
    deduplicate: bool

    def records(self) -> Records:
        """A reader's view of it, with a count of its own."""
        return Records(self.text_field, skip_bad=self.skip_bad)

    def record_path(self, index: int) -> Path:
        """Where the record of part `index` lies."""
        return Path(self.folder) / RECORDS / f"{index:06d}.json"

    def digests_path(self, index: int) -> Path:
        """Where the digests of the part's documents lie."""
        return Path(self.folder) / RECORDS / f"{index:06d}.digests"

    def kept_path(self, index: int) -> Path:
        """Where it is said which of the part's documents are not duplicates."""
        return Path(self.folder) / RECORDS / f"{index:06d}.kept"


def write_bytes(path: Path, array: npt.NDArray[Any]) -> None:
    """Write an array's bytes in one step: what is there is whole."""
    temporary = path.with_suffix(".tmp")
    temporary.write_bytes(array.tobytes())
    temporary.replace(path)


def is_deduplicated(part: Part) -> bool:
    """Whether the part holds whole documents; pieces of one large text are not compared."""
    return not (part.kind == "text" and part.stop is not None)


def split_batches(
    job: Job, part: Part, documents: Iterator[Document]
) -> Iterator[tuple[list[Document], list[Document]]]:
    """(training, validation) documents of a part, some mebibytes at a time."""
    for batch in batched(documents, PART_BYTES):
        if part.role is None:
            yield split(batch, job.val_fraction, corpus_size=job.size)
        else:
            yield ([], batch) if part.role == "val" else (batch, [])


def kept_documents(
    job: Job, index: int, part: Part, records: Records, tokenizer: Tokenizer | None
) -> tuple[Iterator[Document], int]:
    """The documents of a part without the duplicates, and how many those are."""
    documents = read_part(part, records, tokenizer)
    if not (job.deduplicate and is_deduplicated(part)):
        return documents, 0
    kept = np.fromfile(job.kept_path(index), dtype=np.bool_)
    return (document for document, keep in zip(documents, kept, strict=True) if keep), int((~kept).sum())


class PartWorker:
    """Does what a job asks for, part by part."""

    def __init__(self, job: Job):
        self._job, self._folder = job, Path(job.folder)
        self._loaded: Tokenizer | None = None

    def do(self, action: Action, index: int, part: Part, advance: Advance) -> None:
        """Carry out one task; its result is in the folder.

        Raises:
            UserError: something in the part cannot be read.
            OSError: the result cannot be written.
        """
        if action == "digests":
            self._write_digests(index, part, advance)
        else:
            self._write_shards(index, part, advance)

    @property
    def _tokenizer(self) -> Tokenizer | None:
        """None while it is not known: duplicates are found before it is learnt."""
        path = self._folder / TOKENIZER_FILE
        if self._loaded is None and path.exists():
            self._loaded = Tokenizer.from_file(path)
        return self._loaded

    def _write_digests(self, index: int, part: Part, advance: Advance) -> None:
        """SHA-256 of every document, cut to 128 bits: enough that no two differing texts of a corpus ever share it."""
        digests = bytearray()
        for document in read_part(part, self._job.records(), self._tokenizer):
            digests += hashlib.sha256(document.content).digest()[:16]
            advance(document.size, 0)
        write_bytes(self._job.digests_path(index), np.frombuffer(digests, dtype=np.uint8))

    def _write_shards(self, index: int, part: Part, advance: Advance) -> None:
        tokenizer = self._tokenizer
        assert tokenizer is not None
        records = self._job.records()
        names = {role: self._folder / f"{role}-{index:06d}.safetensors" for role in ("train", "val")}
        size = tokenizer.vocab_size
        with (
            ShardWriter(names["train"], size, continues=part.continues) as train,
            ShardWriter(names["val"], size, continues=part.continues) as val,
        ):
            documents, duplicates = kept_documents(self._job, index, part, records, tokenizer)
            first = tokenizer.document_start
            continues = part.continues
            for batches in split_batches(self._job, part, documents):
                for writer, batch in zip((train, val), batches, strict=True):
                    for document in batch:
                        ids, text_bytes = document.encode(tokenizer)
                        writer.add(ids, text_bytes, start=None if continues else first)
                        advance(text_bytes, len(ids))
                        continues = False
            record = PartRecord(
                train=train.finish(), val=val.finish(), skipped_records=records.skipped, duplicates=duplicates
            )
        write_text(self._job.record_path(index), record.model_dump_json())


class _Reporter:
    """Sends progress some times a second, however small the documents are."""

    def __init__(self, send: Callable[[dict[str, Any]], None], every: int = 2**20):
        self._send, self._every = send, every
        self._size = self._tokens = 0

    def __call__(self, size: int, tokens: int) -> None:
        self._size += size
        self._tokens += tokens
        if self._size >= self._every:
            self.flush()

    def flush(self) -> None:
        self._send({"advance": [self._size, self._tokens]})
        self._size = self._tokens = 0


def main() -> None:
    """The worker process: a job, then tasks, as lines on stdin; answers on stdout until stdin ends."""
    tasks: queue.SimpleQueue[str] = queue.SimpleQueue()
    threading.Thread(target=_listen, args=(tasks,), daemon=True).start()
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # what a library prints must not look like an answer

    def send(message: dict[str, Any]) -> None:
        answers.write(json.dumps(message) + "\n")
        answers.flush()

    with contextlib.suppress(BrokenPipeError):  # who started us is gone
        _serve(tasks, send)


def _listen(tasks: "queue.SimpleQueue[str]") -> None:
    """Pass on what is asked; end at once when nobody is left to ask, for whoever is next writes the same files."""
    for line in sys.stdin:
        tasks.put(line)
    os._exit(0)


def _serve(tasks: "queue.SimpleQueue[str]", send: Callable[[dict[str, Any]], None]) -> None:
    worker = PartWorker(Job(**json.loads(tasks.get())))
    while True:
        task = json.loads(tasks.get())
        report = _Reporter(send)
        try:
            worker.do(task["action"], task["index"], Part.from_json(task["part"]), report)
            report.flush()
            send({"done": task["index"]})
        except UserError as error:
            send({"mistake": str(error)})
        except BrokenPipeError:
            raise
        except OSError as error:
            send({"failure": [error.errno, error.strerror, str(error.filename or "")]})
