from importlinter import cli as importlinter


def test_a_file_imports_lower_layers_only() -> None:
    assert importlinter.lint_imports(no_cache=True) == importlinter.EXIT_STATUS_SUCCESS
