import platform
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

pytest.importorskip("hatchling", reason="builds the package; requirements.txt has it")

from hatch_build import compile_kernel

REPOSITORY = Path(__file__).resolve().parents[1]
LIBRARIES = {"gpt/ops/libattention_cpu.so", "gpt/ops/liblinear_cpu.so"}

needs_compiler = pytest.mark.skipif(
    shutil.which("cc") is None or (sys.platform, platform.machine()) != ("linux", "x86_64"),
    reason="needs a C compiler on x86-64 Linux",
)


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """Return a copy of the files that a build reads, without compiled libraries."""
    for name in ("pyproject.toml", "hatch_build.py", "README.md", "LICENSE", ".gitignore"):
        shutil.copy(REPOSITORY / name, tmp_path)
    shutil.copytree(REPOSITORY / "gpt", tmp_path / "gpt", ignore=shutil.ignore_patterns("__pycache__", "*.so"))
    return tmp_path


def build_wheel(checkout: Path, **environment: str) -> Path:
    command = [sys.executable, "-m", "hatchling", "build", "--target", "wheel", "--directory", "dist"]
    subprocess.run(command, cwd=checkout, env=environment or None, check=True, capture_output=True)
    (built,) = (checkout / "dist").glob("*.whl")
    return built


@needs_compiler
def test_a_wheel_contains_the_library_and_has_a_platform_tag(checkout: Path) -> None:
    built = build_wheel(checkout)
    assert LIBRARIES | {"gpt/ops/attention_cpu.c", "gpt/ops/linear_cpu.c"} <= set(zipfile.ZipFile(built).namelist())
    assert not built.name.endswith("-none-any.whl")


def test_without_a_compiler_the_wheel_is_pure_python(checkout: Path) -> None:
    built = build_wheel(checkout, PATH="")
    assert LIBRARIES.isdisjoint(zipfile.ZipFile(built).namelist())
    assert built.name.endswith("-py3-none-any.whl")


@needs_compiler
def test_a_failed_compilation_leaves_no_file(tmp_path: Path) -> None:
    source = tmp_path / "broken.c"
    source.write_text("int broken(")
    with pytest.raises(subprocess.CalledProcessError):
        compile_kernel(source)
    assert [*tmp_path.iterdir()] == [source]
    source.write_text("const char *source(void) { return SOURCE; }")
    library = compile_kernel(source)
    assert {*tmp_path.iterdir()} == {source, library}
