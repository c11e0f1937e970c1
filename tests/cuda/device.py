"""A process of its own in which tensors may lie on a CUDA device that does nothing.

Loading the device changes what torch does in a process for good, so tests run functions there and get their results as
JSON. See `tests/cuda/scenarios.py` for the functions.
"""

import ctypes
import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any, Self

SOURCE = Path(__file__).with_name("noop_device.cpp")
REPOSITORY = Path(__file__).resolve().parents[2]


def compile_device(folder: Path) -> Path:
    """Compile the device into `folder` and return the library."""
    library = folder / "libnoop_device.so"
    include = _find_torch() / "include"
    flags = ["-O0", "-std=c++20", "-shared", "-fPIC", f"-I{include}", f"-I{include}/torch/csrc/api/include"]
    subprocess.run(["c++", *flags, str(SOURCE), "-o", str(library)], check=True)
    return library


def load_device(library: Path) -> None:
    """Register the device in this process, which must not have imported torch yet."""
    assert "torch" not in sys.modules
    for name in ("libc10.so", "libtorch_cpu.so"):
        ctypes.CDLL(str(_find_torch() / "lib" / name), ctypes.RTLD_GLOBAL)
    ctypes.CDLL(str(library), ctypes.RTLD_GLOBAL)


def _find_torch() -> Path:
    spec = importlib.util.find_spec("torch")
    assert spec is not None and spec.origin is not None
    return Path(spec.origin).parent


class FakeCudaProcess:
    """A process with the device, which runs one scenario after the other."""

    def __init__(self, library: Path):
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.cuda.worker", str(library)],
            cwd=REPOSITORY,
            env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(REPOSITORY)},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def run(self, scenario: str, **arguments: Any) -> Any:
        """Return the JSON-like result of a function of `tests.cuda.scenarios`.

        Raises:
            AssertionError: it raised; the message is its traceback.
        """
        assert self._process.stdin is not None and self._process.stdout is not None
        self._process.stdin.write(json.dumps({"scenario": scenario, "arguments": arguments}) + "\n")
        self._process.stdin.flush()
        answer = json.loads(self._process.stdout.readline() or '{"error": "the process ended; see its stderr"}')
        assert "error" not in answer, answer["error"]
        return answer["result"]

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self._process.communicate()
