"""Versions and hardware that a run used, for environment.json."""

import platform
import subprocess
import sys
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

import gpt
from gpt.machine.arithmetic_check import SUSPECTS, read_variables
from gpt.machine.hardware import cpu_name

PACKAGE = Path(gpt.__file__).parent
DRIVER = Path("/proc/driver/nvidia/version")
LIBRARIES = ("torch", "numpy", "tokenizers", "tiktoken", "safetensors", "pydantic")


def describe_environment(runtime: Mapping[str, int | bool]) -> dict[str, Any]:
    """Return versions, hardware, the commit of the code, and the settings of the process.

    Args:
        runtime: settings that `set_up_cpu` returned.
    """
    return {
        "gpt-training-pipeline": gpt.__version__,
        "git_commit": find_git_commit(),
        "python": platform.python_version(),
        # The metadata of PyPI's own builds leave out the build, such as +cpu, on which the bits depend.
        "libraries": {name: metadata.version(name) for name in LIBRARIES} | {"torch": torch.__version__},
        "platform": platform.platform(),
        "cpu": cpu_name(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "threads": torch.get_num_threads(),
        "runtime": dict(runtime),
        "variables": read_variables(SUSPECTS),
        "gpus": [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())],
        "cuda": torch.version.cuda,
        "driver": read_gpu_driver(),
        "command": sys.argv,
    }


def read_gpu_driver() -> str | None:
    """Return the line in which NVIDIA's driver names its version; None without one, or where there is no /proc."""
    try:
        return DRIVER.read_text(encoding="utf-8").splitlines()[0]
    except (OSError, IndexError):
        return None


def find_git_commit() -> str | None:
    """Return the commit of the package's files, marked "-dirty" if they differ from it; None outside their checkout."""

    def git(*arguments: str) -> str:
        return subprocess.run(
            ["git", *arguments], cwd=PACKAGE, capture_output=True, text=True, check=True
        ).stdout.strip()

    try:
        git("ls-files", "--error-unmatch", "__init__.py")  # fails for a package installed inside another checkout
        return git("describe", "--always", "--dirty", "--abbrev=40", "--exclude=*")
    except (OSError, subprocess.CalledProcessError):
        return None
