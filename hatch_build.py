"""Compile gpt/ops/attention_cpu.c at installation; without a compiler torch computes attention, slower."""

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
    """Build hook that puts the library next to its source, and into wheels."""

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        """Compile before a wheel is built, including that of an editable installation."""
        try:
            library = compile_kernel(Path(self.root) / SOURCE)
        except (OSError, subprocess.CalledProcessError) as error:
            self.app.display_warning(f"{SOURCE} is not compiled, torch will compute attention instead: {error}")
            return
        build_data["artifacts"].append(str(library.relative_to(self.root)))
        build_data["pure_python"], build_data["infer_tag"] = False, True


def compile_kernel(source: Path) -> Path:
    """Compile `source` and return the library, a file in the same folder.

    OpenMP functions stay unresolved: they come from the runtime that torch loads. A second runtime would compete for
    the cores.

    Raises:
        OSError: unsupported platform, no compiler, or a folder that is not writable.
        subprocess.CalledProcessError: the compiler failed.
    """
    if (sys.platform, platform.machine()) != ("linux", "x86_64"):
        raise OSError("it needs x86-64 and Linux")
    digest = hashlib.sha256(source.read_bytes()).hexdigest()
    # Python would import a library with the module's name as the module.
    library = source.with_name(f"lib{source.stem}.so")
    with TemporaryDirectory(dir=source.parent) as folder:
        object_file, linked = Path(folder) / "kernel.o", Path(folder) / "kernel.so"
        flags = ["-O3", "-ffp-contract=off", "-fPIC", "-fopenmp", f'-DSOURCE="{digest}"']
        subprocess.run(["cc", *flags, "-c", str(source), "-o", str(object_file)], check=True, capture_output=True)
        subprocess.run(["cc", "-shared", str(object_file), "-o", str(linked), "-lm"], check=True, capture_output=True)
        linked.replace(library)
    return library
