"""The runtime of GGUF files: llama.cpp by llama-cpp-python, in a process of its own."""

import json
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Self

import numpy as np
import torch

from gpt.errors import UserError

WORKER = "gpt.interop.llama_cpp_worker"


def is_installed() -> bool:
    """Return whether llama-cpp-python can be imported."""
    return find_spec("llama_cpp") is not None


class LlamaCppRuntime:
    """A GGUF file in llama.cpp; a context manager, which ends the process.

    Args:
        path: the file.
        context: longest text in tokens.
        vocab_size: number of ids that have a token; the others pad the embedding and are never generated.
    """

    def __init__(self, path: Path, *, context: int, vocab_size: int):
        self.name = f"llama-cpp-python {version('llama-cpp-python')}"
        self._vocab_size = vocab_size
        self._messages = tempfile.TemporaryFile()  # noqa: SIM115 - closed by __exit__
        arguments = [str(path.absolute()), str(context), str(torch.get_num_threads())]
        self._process = subprocess.Popen(
            [sys.executable, "-m", WORKER, *arguments],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._messages,
            cwd=Path(__file__).parents[2],  # where the worker's module is found, also if nothing is installed
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self._process.kill()
        self._process.communicate()
        self._messages.close()

    def encode(self, text: str) -> list[int]:
        """Return the ids of ordinary text."""
        ids: list[int] = self._ask("encode", text)
        return ids

    def compute_logits(self, ids: Sequence[int]) -> torch.Tensor:
        """Return the logits after each token, (T, V) float32."""
        shape = self._ask("compute_logits", list(ids))
        assert self._process.stdout is not None
        data = self._process.stdout.read(4 * int(np.prod(shape)))
        return torch.from_numpy(np.frombuffer(data, dtype=np.float32).reshape(shape).copy())

    def continue_greedily(self, ids: Sequence[int], n_tokens: int) -> list[int]:
        """Return the most likely next token, `n_tokens` times."""
        continued: list[int] = self._ask("continue_greedily", list(ids), n_tokens, self._vocab_size)
        return continued

    def _ask(self, method: str, *arguments: Any) -> Any:
        """Return the first line of the process's answer.

        Raises:
            UserError: llama.cpp refuses the file or crashes.
        """
        assert self._process.stdin is not None and self._process.stdout is not None
        try:
            self._process.stdin.write(json.dumps([method, arguments]).encode() + b"\n")
            self._process.stdin.flush()
            answer = self._process.stdout.readline()
        except OSError:
            answer = b""
        if not answer:
            raise UserError(f"{self.name} cannot run the export: {self._find_reason()}; nothing was written")
        return json.loads(answer)

    def _find_reason(self) -> str:
        """Return llama.cpp's own error message, or the exit status of a process that crashed."""
        status = self._process.wait()
        self._messages.seek(0)
        lines = self._messages.read().decode(errors="replace").splitlines()
        errors = [line.split(": ", 1)[-1] for line in lines if "error" in line.lower()]
        return errors[0] if errors else f"its process ended with status {status}"
