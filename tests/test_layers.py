import subprocess
import sys
from pathlib import Path


def test_files_import_lower_layers_only() -> None:
    command = Path(sys.executable).with_name("lint-imports")
    repository = Path(__file__).resolve().parents[1]
    done = subprocess.run([command, "--no-cache"], cwd=repository, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout
    assert "2 kept, 0 broken" in done.stdout
