"""Compiles gpt/ops/attention_cpu.c when the package is installed; where nothing can, torch does its work, slower."""

import hashlib
import platform
import subprocess
import sys
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface

SOURCE = Path("gpt/ops/attention_cpu.c")


class CompileKernels(BuildHookInterface):
    """Puts the library beside its source, and into wheels."""

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        """Called before a wheel is built, also that of an editable installation."""
        try:
            library = compile_kernel(Path(self.root) / SOURCE)
        except (OSError, subprocess.CalledProcessError) as error:
            self.app.display_warning(f"{SOURCE} is not compiled, torch will do its work: {error}")
            return
        build_data["artifacts"].append(str(library.relative_to(self.root)))
        build_data["pure_python"], build_data["infer_tag"] = False, True


def compile_kernel(source: Path) -> Path:
    """Compile `source` and return the library, which lies beside it.

    Functions of OpenMP are left to be found in the runtime that torch brings: two of them would fight for the cores.

    Raises:
        OSError: the machine is of another kind, there is no compiler, or nothing can be written here.
        subprocess.CalledProcessError: the compiler fails.
    """
    if (sys.platform, platform.machine()) != ("linux", "x86_64"):
        raise OSError("it is for x86-64 and Linux")
    digest = hashlib.sha256(source.read_bytes()).hexdigest()
    # Not of the module's name, or Python would take it for the module.
    library = source.with_name(f"lib{source.stem}.so")
    with TemporaryDirectory(dir=source.parent) as folder:
        made, linked = Path(folder) / "kernel.o", Path(folder) / "kernel.so"
        flags = ["-O3", "-ffp-contract=off", "-fPIC", "-fopenmp", f'-DSOURCE="{digest}"']
        subprocess.run(["cc", *flags, "-c", str(source), "-o", str(made)], check=True, capture_output=True)
        subprocess.run(["cc", "-shared", str(made), "-o", str(linked), "-lm"], check=True, capture_output=True)
        linked.replace(library)
    return library
