"""Compile the C files of gpt/ops during installation; without a compiler, torch computes the same, more slowly."""

import hashlib
import platform
import subprocess
import sys
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface

SOURCES = [Path("gpt/ops/attention_cpu.c"), Path("gpt/ops/linear_cpu.c")]


class CompileKernels(BuildHookInterface):
    """Build hook that puts each library next to its source, and into wheels."""

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        """Compile before a wheel is built; an editable installation builds one too."""
        for source in SOURCES:
            try:
                library = compile_kernel(Path(self.root) / source)
            except (OSError, subprocess.CalledProcessError) as error:
                self.app.display_warning(f"{source} is not compiled, torch computes it instead: {error}")
                continue
            build_data["artifacts"].append(str(library.relative_to(self.root)))
            build_data["pure_python"], build_data["infer_tag"] = False, True


def compile_kernel(source: Path) -> Path:
    """Compile `source` into a library next to it, and return the library's path.

    OpenMP's functions stay undefined, so that they are found in the runtime that torch loads: a second runtime would
    compete with torch's threads for the cores.

    Raises:
        OSError: this is not x86-64 Linux, there is no compiler, or the folder is not writable.
        subprocess.CalledProcessError: the compiler fails.
    """
    if (sys.platform, platform.machine()) != ("linux", "x86_64"):
        raise OSError(f"the kernel needs Linux on x86-64, not {sys.platform} on {platform.machine()}")
    digest = hashlib.sha256(source.read_bytes()).hexdigest()
    # With the prefix: Python would take attention_cpu.so for the module attention_cpu.
    library = source.with_name(f"lib{source.stem}.so")
    with TemporaryDirectory(dir=source.parent) as folder:
        compiled, linked = Path(folder) / "kernel.o", Path(folder) / "kernel.so"
        flags = ["-O3", "-ffp-contract=off", "-fPIC", "-fopenmp", f'-DSOURCE="{digest}"']
        subprocess.run(["cc", *flags, "-c", str(source), "-o", str(compiled)], check=True, capture_output=True)
        subprocess.run(["cc", "-shared", str(compiled), "-o", str(linked), "-lm"], check=True, capture_output=True)
        linked.replace(library)
    return library
