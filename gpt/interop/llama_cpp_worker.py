"""`python -m gpt.interop.llama_cpp_worker FILE CONTEXT THREADS`: run a GGUF file by llama.cpp for another process.

A process of its own, because a crash of native code would end the export without its clean-up. Each line on stdin is a
request in JSON, [METHOD, ARGUMENTS]; the answer on stdout is a line of JSON, followed by the logits' bytes if it is
their shape.
"""

import ctypes
import json
import sys
from collections.abc import Sequence
from typing import Any

import llama_cpp
import numpy as np
import numpy.typing as npt

GGML_TYPE_F32 = 0


class Model:
    """A GGUF file, loaded by llama.cpp on the CPU, with keys and values in float32.

    Args:
        path: the file.
        context: longest text in tokens.
        threads: number of threads.
    """

    def __init__(self, path: str, *, context: int, threads: int):
        llama_cpp.llama_backend_init()
        settings = llama_cpp.llama_model_default_params()
        settings.n_gpu_layers = 0
        settings.use_extra_bufts = False  # llama.cpp's own kernels for AMX crash in some virtual machines
        self._model = llama_cpp.llama_model_load_from_file(path.encode(), settings)
        if not self._model:
            raise SystemExit(1)
        self._vocab = llama_cpp.llama_model_get_vocab(self._model)
        self._vocab_size = llama_cpp.llama_vocab_n_tokens(self._vocab)
        options = llama_cpp.llama_context_default_params()
        options.n_ctx = options.n_batch = options.n_ubatch = context
        options.n_threads = options.n_threads_batch = threads
        options.type_k = options.type_v = GGML_TYPE_F32
        options.flash_attn_type = llama_cpp.LLAMA_FLASH_ATTN_TYPE_DISABLED  # it rounds to float16
        self._context = llama_cpp.llama_init_from_model(self._model, options)
        if not self._context:
            raise SystemExit(1)
        self._batch = llama_cpp.llama_batch_init(context, 0, 1)

    def encode(self, text: str) -> list[int]:
        """Return the ids of ordinary text."""
        data = text.encode()
        ids = (ctypes.c_int32 * (len(data) + 8))()
        count = llama_cpp.llama_tokenize(self._vocab, data, len(data), ids, len(ids), False, False)
        return list(ids[:count])

    def compute_logits(self, ids: Sequence[int]) -> npt.NDArray[np.float32]:
        """Return the logits after each token, (T, V)."""
        self._reset()
        return self._decode(ids, start=0)

    def continue_greedily(self, ids: Sequence[int], n_tokens: int, vocab_size: int) -> list[int]:
        """Return the most likely next token among the first `vocab_size` ids, `n_tokens` times."""
        self._reset()
        continued: list[int] = []
        pending, start = list(ids), 0
        for _ in range(n_tokens):
            logits = self._decode(pending, start=start)[-1]
            start += len(pending)
            pending = [int(logits[:vocab_size].argmax())]
            continued += pending
        return continued

    def _reset(self) -> None:
        llama_cpp.llama_memory_clear(llama_cpp.llama_get_memory(self._context), True)

    def _decode(self, ids: Sequence[int], *, start: int) -> npt.NDArray[np.float32]:
        """Return the logits after each of these tokens, whose first has the position `start`."""
        batch = self._batch
        batch.n_tokens = len(ids)
        for index, token in enumerate(ids):
            batch.token[index], batch.pos[index] = token, start + index
            batch.n_seq_id[index], batch.seq_id[index][0], batch.logits[index] = 1, 0, True
        if llama_cpp.llama_decode(self._context, batch) != 0:
            raise SystemExit(1)
        logits = llama_cpp.llama_get_logits(self._context)
        return np.ctypeslib.as_array(logits, shape=(len(ids), self._vocab_size)).copy()


def main() -> None:
    """Answer requests until stdin is closed."""
    path, context, threads = sys.argv[1:]
    model = Model(path, context=int(context), threads=int(threads))
    for line in sys.stdin.buffer:
        method, arguments = json.loads(line)
        result: Any = getattr(model, method)(*arguments)
        is_array = isinstance(result, np.ndarray)
        sys.stdout.buffer.write(json.dumps(result.shape if is_array else result).encode() + b"\n")
        if is_array:
            sys.stdout.buffer.write(result.tobytes())
        sys.stdout.buffer.flush()


if __name__ == "__main__":
    main()
