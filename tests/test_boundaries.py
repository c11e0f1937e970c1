"""Names that only some packages may use, found in the syntax tree of every module."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parents[1] / "gpt"
BOUNDARIES = {
    "os.environ": ("utils", "machine"),
    "os.getenv": ("utils", "machine"),
    "os.putenv": ("utils", "machine"),
    "torch.distributed": ("utils/distributed.py", "utils/rendezvous.py", "parallel", "checkpoint"),
}


def names_in(source: str) -> Iterator[str]:
    """Dotted names that a module imports or evaluates."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield from (f"{node.module}.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.Attribute):
            yield ast.unparse(node)


def uses(source: str, name: str) -> bool:
    return any(found == name or found.startswith(f"{name}.") for found in names_in(source))


@pytest.mark.parametrize("name", BOUNDARIES)
def test_a_name_is_used_only_where_it_belongs(name: str) -> None:
    modules = {path.relative_to(PACKAGE).as_posix(): path.read_text() for path in PACKAGE.rglob("*.py")}
    assert len(modules) > 100
    allowed = BOUNDARIES[name]
    strays = [
        module
        for module, source in modules.items()
        if uses(source, name) and not any(module == place or module.startswith(f"{place}/") for place in allowed)
    ]
    assert strays == []


@pytest.mark.parametrize(
    "source",
    [
        "import torch.distributed as dist",
        "from torch import distributed",
        "from torch.distributed import TCPStore",
        "from torch.distributed.tensor import DTensor",
        "import torch\n\n\ndef f():\n    torch.distributed.barrier()",
    ],
)
def test_a_use_is_found(source: str) -> None:
    assert uses(source, "torch.distributed")
    assert not uses("command = ['-m', 'torch.distributed.run']  # torch.distributed", "torch.distributed")
