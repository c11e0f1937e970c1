"""Fixtures of the tests of the preparation."""

import json
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest

from gpt.data.prepare import parts
from tests.conftest import make_text


@pytest.fixture(scope="session")
def sources(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Write a folder of texts, JSON lines, Parquet and one large text; documents repeat within and across them."""
    root = tmp_path_factory.mktemp("sources")
    texts = [make_text(60 + index % 50, seed=index % 70) for index in range(120)]
    (root / "texts").mkdir()
    for index, text in enumerate(texts[:40]):
        (root / "texts" / f"{index:02d}.txt").write_text(text)
    lines = "".join(json.dumps({"text": text}) + "\n" for text in texts)
    (root / "lines.jsonl").write_text(lines + '{"text": 5}\n')
    pyarrow.parquet.write_table(pyarrow.table({"text": texts[::-1]}), root / "rows.parquet", row_group_size=9)
    (root / "large.txt").write_text(make_text(20_000, seed=1000))
    return [root / name for name in ("texts", "lines.jsonl", "rows.parquet", "large.txt")]


@pytest.fixture
def small_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Cut small parts in this process, which hands them to its workers."""
    monkeypatch.setattr(parts, "PART_BYTES", 5000)
