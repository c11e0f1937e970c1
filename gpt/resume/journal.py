"""journal.jsonl: which global batches a run leaves out and why, and where it went back to before it went on without.

One JSON object a line, on the disk before training goes on. A run that continues and a run that is given the journal
take the same batches as the run that wrote it.
"""

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from gpt.data.quarantine import Quarantine
from gpt.errors import UserError
from gpt.utils.atomic_io import append_jsonl
from gpt.utils.distributed import DistContext

Record = dict[str, Any]


class Journal:
    """The journal of a run: every process knows it, rank 0 writes it.

    Args:
        path: of the file.
        order: digest of the order of batches, by which a journal of other batches is told.
        records: what it holds already.
        dist: the processes that train.
    """

    def __init__(self, path: Path, order: str, records: Iterable[Record], dist: DistContext):
        self._path, self._order, self._dist = path, order, dist
        held = list(records)
        self.quarantine = quarantine_of(held)
        self.rollbacks = sum("to_step" in record for record in held)
        """How often this run went back."""

    def add_rollback(self, bad_steps: Mapping[int, str], to_step: int, reason: str) -> None:
        """Put the batches of bad steps into quarantine; they are on the disk when this returns.

        Args:
            bad_steps: number of a step, the first one being 1 -> what was wrong with it.
            to_step: where the run goes on from.
            reason: for people.

        Raises:
            UserError: the disk refused.
        """
        batches = {str(self.quarantine.find_batch(step - 1)): why for step, why in bad_steps.items()}
        record = {"order": self._order, "quarantined": batches, "to_step": to_step, "reason": reason}
        self._dist.on_main(lambda: _append(self._path, record))
        for batch in batches:
            self.quarantine.add(int(batch))
        self.rollbacks += 1


def quarantine_of(records: Iterable[Record]) -> Quarantine:
    """All the batches that a journal leaves out."""
    return Quarantine(int(batch) for record in records for batch in record["quarantined"])


def _append(path: Path, record: Record) -> None:
    """Add a line of JSON; it and the file's name are on the disk when this returns.

    Raises:
        UserError: the disk refused.
    """
    try:
        append_jsonl(path, record, durable=True)
    except OSError as error:
        raise UserError(f"{path}: cannot be written: {error.strerror}; the last checkpoint is untouched") from error


def read_journal(path: Path, order: str) -> list[Record]:
    """The records of a journal; none if there is no file.

    A last line without its end is no record: whoever was to write it had not gone on.

    Raises:
        UserError: it is damaged, or of other batches than those of `order`.
    """
    try:
        lines = path.read_text(encoding="utf-8").split("\n")[:-1]
    except FileNotFoundError:
        return []
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: damaged: not UTF-8 at byte {error.start}; restore it from a copy") from error
    return [_parse(line, f"{path}, line {number}", order) for number, line in enumerate(lines, 1)]


def _parse(line: str, place: str, order: str) -> Record:
    try:
        record: Record = json.loads(line)
        sound = all(batch.isascii() and batch.isdecimal() and len(batch) < 19 for batch in record["quarantined"])
        recorded = record["order"]
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        sound, recorded = False, None
    if not sound:
        raise UserError(f"{place}: damaged: no record of quarantined batches; restore it from a copy")
    if recorded != order:
        raise UserError(f"{place}: of another order of batches: its run had other data, seed, block or batch size")
    return record


def joined(own: list[Record], other: list[Record], source: Path, order: str, step: int) -> list[Record]:
    """`own`, and as one record more the batches of `other` that are not there yet.

    Args:
        own: of this run.
        other: from `source`.
        source: another journal.
        order: digest of the order of batches.
        step: that the run is at.

    Raises:
        UserError: one of them was trained on already.
    """
    known = quarantine_of(own)
    more = {batch: why for record in other for batch, why in record["quarantined"].items() if int(batch) not in known}
    for batch in more:
        if int(batch) < known.find_batch(step):
            raise UserError(f"{source}: batch {batch} was trained on before step {step}; name another --run-dir")
    return [*own, {"order": order, "quarantined": more, "from": str(source)}] if more else own
