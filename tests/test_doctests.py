"""The worked examples in docstrings."""

import doctest
import importlib
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
MODULES = [
    ".".join(path.relative_to(ROOT).with_suffix("").parts)
    for path in sorted((ROOT / "gpt").rglob("*.py"))
    if ">>> " in path.read_text(encoding="utf-8")
]


def test_schedules_have_worked_examples() -> None:
    assert "gpt.utils.custom_scheduler" in MODULES


@pytest.mark.parametrize("name", MODULES)
def test_worked_examples_are_right(name: str) -> None:
    failed, attempted = doctest.testmod(importlib.import_module(name))
    assert failed == 0
    assert attempted > 0
