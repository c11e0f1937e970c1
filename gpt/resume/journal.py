"""journal.jsonl: the global batches that a run leaves out, why, and the steps it rolled back to.

Each line is one JSON object, and is on the disk before training goes on. A resumed run, and a run that is given the
journal of another, take the same batches as the run that wrote it.
"""

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from gpt.checkpoint.run_folder import RunFolder, find_run
from gpt.data.quarantine import Quarantine
from gpt.errors import UserError
from gpt.resume.find import Start
from gpt.utils.atomic_io import append_jsonl
from gpt.utils.distributed import DistContext

Record = dict[str, Any]


class Journal:
    """The journal of a run: every rank knows it, rank 0 writes it.

    Args:
        path: the file.
        order: `RunPlan.order`; a journal with another order describes other batches.
        records: contents of the file.
        dist: the ranks of the run.
    """

    def __init__(self, path: Path, order: str, records: Iterable[Record], dist: DistContext):
        self._path, self._order, self._dist = path, order, dist
        records = list(records)
        self.quarantine = build_quarantine(records)
        self.rollbacks = sum("to_step" in record for record in records)
        """Number of rollbacks of this run."""

    def add_rollback(self, bad_steps: Mapping[int, str], to_step: int, reason: str) -> None:
        """Quarantine the batches of bad steps; they are on the disk when this returns.

        Args:
            bad_steps: step, the first one being 1 -> what was wrong with it.
            to_step: the step that the run goes on from.
            reason: one line for the user.

        Raises:
            UserError: the file cannot be written.
        """
        batches = {str(self.quarantine.find_batch(step - 1)): why for step, why in bad_steps.items()}
        record = {"order": self._order, "quarantined": batches, "to_step": to_step, "reason": reason}
        self._dist.on_main(lambda: _append(self._path, record))
        for batch in batches:
            self.quarantine.add(int(batch))
        self.rollbacks += 1


def build_quarantine(records: Iterable[Record]) -> Quarantine:
    """Return all batches that a journal leaves out."""
    return Quarantine(int(batch) for record in records for batch in record["quarantined"])


def collect_records(folder: RunFolder, start: Start, order: str, given: Path | None) -> list[Record]:
    """Return the run's own records, and those it inherits from the run that it forks and from `--spike.journal`.

    Args:
        folder: the run folder.
        start: the state that the run starts from.
        order: `RunPlan.order`.
        given: the value of --spike.journal.

    Raises:
        UserError: a journal is damaged, belongs to other data, or leaves out a batch that was trained on already.
    """
    records = read_journal(folder.journal, order)
    if start.is_fork and start.checkpoint is not None:
        forked = find_run(start.checkpoint).journal
        records = merge_records(records, read_journal(forked, order), forked, order, step=0)
    if given is not None:
        if not given.is_file():
            raise UserError(f"--spike.journal {given}: no such file; name the journal.jsonl of a run")
        records = merge_records(records, read_journal(given, order), given, order, step=start.step)
    return records


def read_journal(path: Path, order: str) -> list[Record]:
    """Return the records of a journal; none if there is no file.

    A last line without its newline is ignored: the run that was writing it had not gone on.

    Raises:
        UserError: the journal is damaged, or its batches are not those of `order`.
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


def merge_records(own: list[Record], other: list[Record], source: Path, order: str, *, step: int) -> list[Record]:
    """Return `own`, followed by one record with the batches of `other` that `own` lacks.

    Args:
        own: records of this run.
        other: records of another run.
        source: its journal.
        order: `RunPlan.order`.
        step: the step that this run is at.

    Raises:
        UserError: this run was trained on one of those batches.
    """
    known = build_quarantine(own)
    new = {batch: why for record in other for batch, why in record["quarantined"].items() if int(batch) not in known}
    for batch in new:
        if int(batch) < known.find_batch(step):
            raise UserError(f"{source}: batch {batch} was trained on before step {step}; use another --run-dir")
    return [*own, {"order": order, "quarantined": new, "from": str(source)}] if new else own


def _append(path: Path, record: Record) -> None:
    try:
        append_jsonl(path, record, durable=True)
    except OSError as error:
        raise UserError(f"{path}: cannot be written: {error.strerror}; the last checkpoint is untouched") from error


def _parse(line: str, place: str, order: str) -> Record:
    try:
        record: Record = json.loads(line)
        is_valid = all(batch.isascii() and batch.isdecimal() and len(batch) < 19 for batch in record["quarantined"])
        recorded_order = record["order"]
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        is_valid, recorded_order = False, None
    if not is_valid:
        raise UserError(f"{place}: damaged: no record of quarantined batches; restore it from a copy")
    if recorded_order != order:
        raise UserError(f"{place}: written for other batches: its run had other data, seed, block size or batch size")
    return record
