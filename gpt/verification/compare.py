"""Two runs, compared in every bit that is not the clock's.

What a run draws is addressed by its seed and a position (`gpt.utils.helper.draw`), so there is no generator whose
state could differ: the losses, the texts and the position say it all.
"""

import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import zip_longest
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

from gpt.checkpoint.manifest import MODEL, OPTIMIZER, PROGRESS, VAL_LOSS
from gpt.checkpoint.run_folder import RunFolder
from gpt.resume.compatibility import leaves
from gpt.utils.atomic_io import read_json, read_jsonl
from gpt.verification.watch import LOSS

OF_THE_CLOCK = {"tokens_per_second", "mfu", "peak_memory_bytes"}
"""Metrics of the machine, which are never the same twice."""
_ABSENT = "nothing"


@dataclass(frozen=True)
class Difference:
    """Where two runs part."""

    where: str
    reference: str
    resumed: str
    count: int = 1
    """Values that differ there; the first is shown."""

    def __str__(self) -> str:
        return f"{self.where}: {self.reference} in the reference, {self.resumed} in the resumed run"


@dataclass
class Comparison:
    """What was compared, and what was found."""

    losses: int = 0
    evaluations: int = 0
    texts: int = 0
    tensors: int = 0
    nbytes: int = 0
    """Of the tensors."""
    differences: list[Difference] = field(default_factory=list)
    """In the order in which a run would have come to them; none: every bit is the same."""


def compare(reference: RunFolder, resumed: RunFolder) -> Comparison:
    """Compare all losses, evaluations and texts, and the last checkpoints' weights, optimizers and progress."""
    found = Comparison()
    metrics = [_records(folder.metrics) for folder in (reference, resumed)]
    found.losses = sum(LOSS in record for record in metrics[0])
    found.evaluations = sum(VAL_LOSS in record for record in metrics[0])
    found.differences += _of_records(reference.metrics.name, *metrics)
    texts = [_records(folder.samples) for folder in (reference, resumed)]
    found.texts = len(texts[0])
    found.differences += _of_records(reference.samples.name, *texts)
    last = [folder.committed()[-1] for folder in (reference, resumed)]
    if last[0].name != last[1].name:
        found.differences.append(Difference("last checkpoint", last[0].name, last[1].name))
        return found
    for name in (MODEL, OPTIMIZER):
        for difference, nbytes in _of_tensors(last[0] / name, last[1] / name):
            found.tensors += 1
            found.nbytes += nbytes
            found.differences += [difference] if difference else []
    progress = [leaves(read_json(path / PROGRESS)) for path in last]
    found.differences += _of_record(f"{last[0].name}/{PROGRESS}", *progress)
    return found


def _records(path: Path) -> list[dict[str, Any]]:
    return [{key: record[key] for key in record.keys() - OF_THE_CLOCK} for record in read_jsonl(path)]


def _of_records(name: str, reference: list[dict[str, Any]], resumed: list[dict[str, Any]]) -> Iterator[Difference]:
    for number, (ours, theirs) in enumerate(zip_longest(reference, resumed), 1):
        if ours is None or theirs is None or ours["step"] != theirs["step"] or ours.keys() != theirs.keys():
            there, here = (_ABSENT if record is None else _shown(record) for record in (ours, theirs))
            yield Difference(f"{name}, record {number}", there, here)
            return  # what comes after it is moved, not changed
        yield from _of_record(f"{name}, step {ours['step']}", ours, theirs)


def _of_record(place: str, reference: dict[str, Any], resumed: dict[str, Any]) -> Iterator[Difference]:
    for key in sorted(reference.keys() | resumed.keys()):
        ours, theirs = (_shown(record[key]) if key in record else _ABSENT for record in (reference, resumed))
        if ours != theirs:
            yield Difference(f"{place}: {key}", ours, theirs)


def _shown(value: Any) -> str:
    """A number's shortest text that gives the same bits again; equal texts are equal values."""
    return json.dumps(value, sort_keys=True)


def _of_tensors(reference: Path, resumed: Path) -> Iterator[tuple[Difference | None, int]]:
    """For each tensor of two files, read one at a time: what differs, and its bytes."""
    place = f"{reference.parent.name}/{reference.name}"
    with safe_open(reference, framework="pt") as ours, safe_open(resumed, framework="pt") as theirs:
        for name in sorted({*ours.keys(), *theirs.keys()}):
            if name not in ours.keys() or name not in theirs.keys():  # noqa: SIM118
                there, here = (name if name in file.keys() else _ABSENT for file in (ours, theirs))  # noqa: SIM118
                yield Difference(place, there, here), 0
                continue
            pair = ours.get_tensor(name), theirs.get_tensor(name)
            yield _of_tensor(f"{place}: {name}", *pair), pair[0].nbytes


def _of_tensor(place: str, reference: torch.Tensor, resumed: torch.Tensor) -> Difference | None:
    there, here = (f"{tensor.dtype} {tuple(tensor.shape)}" for tensor in (reference, resumed))
    if there != here:
        return Difference(place, there, here)
    width = reference.element_size()
    ours, theirs = (tensor.reshape(-1).view(torch.uint8).reshape(-1, width) for tensor in (reference, resumed))
    apart = (ours != theirs).any(dim=1).reshape(reference.shape).nonzero()
    if not len(apart):
        return None
    at = tuple(apart[0].tolist())
    there, here = (repr(tensor[at].item()) for tensor in (reference, resumed))
    return Difference(f"{place}{list(at)}", there, here, len(apart))
