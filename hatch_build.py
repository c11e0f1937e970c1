"""Compiles gpt/kernels/attention.c when the package is installed; where nothing can, torch does its work, slower."""

import hashlib
import subprocess
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface

SOURCE = Path("gpt/kernels/attention.c")


class CompileKernels(BuildHookInterface):
    """Puts the library beside its source, and into wheels."""

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        """Called before a wheel is built, also that of an editable installation."""
        if compile_kernel(Path(self.root) / SOURCE):
            build_data["artifacts"].append(str(library_of(SOURCE)))
            build_data["pure_python"], build_data["infer_tag"] = False, True


def library_of(source: Path) -> Path:
    """Not of the module's name, or Python would take it for the module."""
    return source.with_name(f"lib{source.stem}.so")


def compile_kernel(source: Path) -> bool:
    """Whether `source` could be compiled.

    Functions of OpenMP are left to be found in the runtime that torch brings: two of them would fight for the cores.
    """
    digest = hashlib.sha256(source.read_bytes()).hexdigest()
    library = library_of(source)
    with TemporaryDirectory(dir=source.parent) as folder:
        made, linked = Path(folder) / "kernel.o", Path(folder) / "kernel.so"
        compile_it = ["cc", "-O3", "-fPIC", "-fopenmp", f'-DSOURCE="{digest}"', "-c", str(source), "-o", str(made)]
        try:
            subprocess.run(compile_it, check=True, capture_output=True)
            subprocess.run(["cc", "-shared", str(made), "-o", str(linked), "-lm"], check=True, capture_output=True)
        except (OSError, subprocess.CalledProcessError):
            return False
        linked.replace(library)
    return True
