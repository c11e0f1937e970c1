"""What a run ran on, for environment.json."""

import platform
import subprocess
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from gpt import __version__

LIBRARIES = ("torch", "numpy", "tokenizers", "tiktoken", "safetensors", "pydantic")


def environment() -> dict[str, Any]:
    """Versions, hardware and the commit of the code."""
    return {
        "gpt-training-pipeline": __version__,
        "git_commit": git_commit(),
        "python": platform.python_version(),
        "libraries": {name: metadata.version(name) for name in LIBRARIES},
        "platform": platform.platform(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "threads": torch.get_num_threads(),
        "gpus": [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())],
        "cuda": torch.version.cuda,
        "command": sys.argv,
    }


def git_commit() -> str | None:
    """The commit that the package's files are at, marked where they differ from it; None outside a checkout."""
    folder = Path(__file__).parent
    try:
        described = subprocess.run(
            ["git", "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"],
            cwd=folder,
            capture_output=True,
            text=True,
            check=True,
        )
    except (OSError, subprocess.CalledProcessError):
        return None
    return described.stdout.strip()
