"""docs/reliability.md names tests as evidence: each of them exists."""

import ast
import re
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
DOCUMENT = ROOT / "docs" / "reliability.md"
FAULTS_FOLDER = Path("tests/faults")


def read_fault_table() -> list[list[str]]:
    """Return the cells of each row of the table of faults."""
    section = DOCUMENT.read_text(encoding="utf-8").partition("## Faults")[2].partition("\n## ")[0]
    rows = [line.strip("| ").split(" | ") for line in section.splitlines() if line.startswith("| ")]
    return rows[2:]  # after the header and the line below it


def parse_references(cell: str) -> list[tuple[Path, str | None]]:
    """Return the files that a cell names, each with a test in it, or with None for the file as a whole."""
    references: list[tuple[Path, str | None]] = []
    file = None
    for name in re.findall(r"`([^`]+)`", cell):
        if name.endswith(".py"):
            file = Path(name) if "/" in name else FAULTS_FOLDER / name
            references.append((file, None))
        else:
            assert file is not None, f"{name} stands before any file: {cell}"
            references.append((file, name))
    return references


def test_every_test_named_in_the_fault_table_exists() -> None:
    rows = read_fault_table()
    assert len(rows) > 40
    missing = []
    for row in rows:
        assert len(row) == 3, row
        references = parse_references(row[2])
        assert references, row
        for file, test in references:
            if not (ROOT / file).is_file():
                missing.append(f"{file}")
            elif test is not None:
                tree = ast.parse((ROOT / file).read_text(encoding="utf-8"))
                defined = {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}
                missing += [] if test in defined else [f"{file}: {test}"]
    assert not missing, f"docs/reliability.md names tests that do not exist: {missing}"


def test_every_test_file_in_a_command_exists() -> None:
    commands = re.findall(r"`pytest [^`]*?(tests/[^` ]+)", DOCUMENT.read_text(encoding="utf-8"))
    assert len(commands) > 4
    assert [path for path in commands if not (ROOT / path).exists()] == []
