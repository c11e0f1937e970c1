import doctest
from pathlib import Path

import numpy as np
import pytest

from gpt.data.prepare import dedup
from gpt.data.prepare.documents import TextDocument
from tests.conftest import make_text
from tests.data.prepare.prepared import decode_documents, prepare


@pytest.mark.usefixtures("small_parts")
def test_first_of_equal_documents_is_kept(tmp_path: Path, sources: list[Path]) -> None:
    manifest = prepare(tmp_path / "out", sources, on_error="skip", deduplicate=True, val_fraction=0.0)
    texts = [make_text(60 + index % 50, seed=index % 70) for index in range(120)]
    remaining = [*dict.fromkeys([*texts[:40], *texts, *texts[::-1]])]
    assert decode_documents(tmp_path / "out", "train") == [*remaining, make_text(20_000, seed=1000)]
    in_folder, in_lines = len({*texts[:40]}), len({*texts})
    assert [entry.duplicates for entry in manifest.sources] == [
        40 - in_folder,
        120 - (in_lines - in_folder),
        120,
        0,
    ]
    assert [entry.skipped_records for entry in manifest.sources] == [0, 1, 0, 0]
    assert manifest.documents == len(remaining) + 1


def test_worked_example() -> None:
    results = doctest.testmod(dedup)
    assert (results.attempted, results.failed) == (1, 0)


@pytest.mark.parametrize("n", [0, 1, 2, 50, 2000])
def test_find_first_occurrences_equals_comparing_one_by_one(n: int) -> None:
    digests = np.random.default_rng(n).integers(0, 20, (n, 2)).astype(np.uint64)
    seen: set[tuple[int, ...]] = set()
    expected = []
    for row in map(tuple, digests.tolist()):
        expected.append(row not in seen)
        seen.add(row)
    assert dedup.find_first_occurrences(digests).tolist() == expected


def test_keep_masks_compare_documents_across_parts(tmp_path: Path) -> None:
    parts = [["a", "b", "a"], [], ["c", "b"], ["a"]]
    digests = [tmp_path / f"{index}.digests" for index in range(len(parts))]
    masks = [tmp_path / f"{index}.kept" for index in range(len(parts))]
    for path, texts in zip(digests, parts, strict=True):
        dedup.write_digests((TextDocument("name", text) for text in texts), path)
        assert path.stat().st_size == len(texts) * dedup.DIGEST_BYTES
    dedup.write_keep_masks(digests, masks)
    remaining = [
        [document.content.decode() for document in dedup.drop_duplicates([TextDocument("", t) for t in texts], mask)]
        for texts, mask in zip(parts, masks, strict=True)
    ]
    assert remaining == [["a", "b"], [], ["c"], []]
    assert [dedup.count_duplicates(mask) for mask in masks] == [1, 0, 1, 1]
