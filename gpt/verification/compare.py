"""Bit-exact comparison of two runs.

Randomness is addressed by the seed and a position (`gpt.utils.helper.random_bits`), so there is no generator state to
compare: metrics, samples, the journal, and the last checkpoint's tensors and progress are the whole result of a run.
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
from gpt.resume.compatibility import flatten
from gpt.utils.atomic_io import read_json, read_jsonl
from gpt.verification.watcher import TRAIN_LOSS

MACHINE_METRICS = frozenset({"time", "tokens_per_second", "mfu", "mfu_data_sheet", "peak_memory_bytes"})
"""Metrics that measure the machine; they vary from launch to launch and are not compared."""
_MISSING = "nothing"
"""Text shown for a record, key or tensor that one of the two runs lacks."""


@dataclass(frozen=True)
class BitDifference:
    """Place at which two runs differ."""

    location: str
    reference: str
    resumed: str
    n_values: int = field(default=1, kw_only=True)
    """Values that differ at this location; `reference` and `resumed` are the first of them."""

    def __str__(self) -> str:
        return f"{self.location}: {self.reference} in the reference, {self.resumed} in the resumed run"


@dataclass
class Comparison:
    """Counts of what was compared, and the differences."""

    n_losses: int = 0
    n_evaluations: int = 0
    n_samples: int = 0
    n_rollbacks: int = 0
    n_tensors: int = 0
    tensor_bytes: int = 0
    differences: list[BitDifference] = field(default_factory=list)
    """Differences in the order in which training produces the values; empty if the runs are bit-exact."""


def compare(reference: RunFolder, resumed: RunFolder) -> Comparison:
    """Compare all metrics and samples, the journal, and the last checkpoint's weights, optimizer state and progress."""
    comparison = Comparison()
    metrics = [_read_records(folder.metrics) for folder in (reference, resumed)]
    comparison.n_losses = sum(TRAIN_LOSS in record for record in metrics[0])
    comparison.n_evaluations = sum(VAL_LOSS in record for record in metrics[0])
    comparison.differences += _compare_records(reference.metrics.name, *metrics)
    samples = [_read_records(folder.samples) for folder in (reference, resumed)]
    comparison.n_samples = len(samples[0])
    comparison.differences += _compare_records(reference.samples.name, *samples)
    journals = [list(read_jsonl(folder.journal)) for folder in (reference, resumed)]
    comparison.n_rollbacks = sum("to_step" in record for record in journals[0])
    comparison.differences += _compare_journals(reference.journal.name, *journals)
    last = [folder.list_checkpoints()[-1] for folder in (reference, resumed)]
    if last[0].name != last[1].name:
        comparison.differences.append(BitDifference("last checkpoint", last[0].name, last[1].name))
        return comparison
    for name in (MODEL, OPTIMIZER):
        for difference, n_bytes in _compare_tensor_files(last[0] / name, last[1] / name):
            comparison.n_tensors += 1
            comparison.tensor_bytes += n_bytes
            comparison.differences += [difference] if difference else []
    progress = [flatten(read_json(path / PROGRESS)) for path in last]
    comparison.differences += _compare_dicts(f"{last[0].name}/{PROGRESS}", *progress)
    return comparison


def _read_records(path: Path) -> list[dict[str, Any]]:
    return [{key: record[key] for key in record.keys() - MACHINE_METRICS} for record in read_jsonl(path)]


def _compare_records(
    file_name: str, reference: list[dict[str, Any]], resumed: list[dict[str, Any]]
) -> Iterator[BitDifference]:
    for number, (expected, actual) in enumerate(zip_longest(reference, resumed), 1):
        if expected is None or actual is None or expected["step"] != actual["step"] or expected.keys() != actual.keys():
            texts = (_MISSING if record is None else _format_value(record) for record in (expected, actual))
            yield BitDifference(f"{file_name}, record {number}", *texts)
            return  # a record is missing or extra, so the later ones no longer line up
        yield from _compare_dicts(f"{file_name}, step {expected['step']}", expected, actual)


def _compare_journals(
    file_name: str, reference: list[dict[str, Any]], resumed: list[dict[str, Any]]
) -> Iterator[BitDifference]:
    for number, records in enumerate(zip_longest(reference, resumed), 1):
        expected, actual = (_MISSING if record is None else _format_value(record) for record in records)
        if expected != actual:
            yield BitDifference(f"{file_name}, record {number}", expected, actual)


def _compare_dicts(location: str, reference: dict[str, Any], resumed: dict[str, Any]) -> Iterator[BitDifference]:
    for key in sorted(reference.keys() | resumed.keys()):
        expected, actual = (
            _format_value(record[key]) if key in record else _MISSING for record in (reference, resumed)
        )
        if expected != actual:
            yield BitDifference(f"{location}: {key}", expected, actual)


def _format_value(value: Any) -> str:
    """Return the value as JSON, which gives equal texts for floats only if their bits are equal."""
    return json.dumps(value, sort_keys=True)


def _compare_tensor_files(reference: Path, resumed: Path) -> Iterator[tuple[BitDifference | None, int]]:
    """Yield the difference, or None, and the bytes of each tensor; one pair of tensors is in memory at a time."""
    location = f"{reference.parent.name}/{reference.name}"
    with safe_open(reference, framework="pt") as reference_file, safe_open(resumed, framework="pt") as resumed_file:
        names = set(reference_file.keys()), set(resumed_file.keys())
        for name in sorted(names[0] | names[1]):
            if name not in names[0] & names[1]:
                yield BitDifference(location, *(name if name in own else _MISSING for own in names)), 0
                continue
            expected, actual = reference_file.get_tensor(name), resumed_file.get_tensor(name)
            yield _compare_tensors(f"{location}: {name}", expected, actual), expected.nbytes


def _compare_tensors(location: str, reference: torch.Tensor, resumed: torch.Tensor) -> BitDifference | None:
    layouts = [f"{tensor.dtype} {tuple(tensor.shape)}" for tensor in (reference, resumed)]
    if layouts[0] != layouts[1]:
        return BitDifference(location, *layouts)
    element_bytes = reference.element_size()
    # Bytes are compared, not values: 0.0 == -0.0, and NaN != NaN.
    expected, actual = (
        tensor.reshape(-1).view(torch.uint8).reshape(-1, element_bytes) for tensor in (reference, resumed)
    )
    differing = (expected != actual).any(dim=1).reshape(reference.shape).nonzero()
    if not len(differing):
        return None
    index = tuple(differing[0].tolist())
    values = (repr(tensor[index].item()) for tensor in (reference, resumed))
    return BitDifference(f"{location}{list(index)}", *values, n_values=len(differing))
