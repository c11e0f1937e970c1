"""`python -m benchmarks.llama_cpp_generation FILE THREADS CONTEXT`: time generation by llama.cpp for another process.

A process of its own, because llama.cpp's threads would disturb torch's. Each line on stdin is a JSON object with the
prompts and the number of new tokens; the answer on stdout is a line of JSON with the seconds of prefill and of all.
llama.cpp has its own defaults: flash attention where it thinks fit, keys and values in float16.
"""

import json
import sys
import time
from collections.abc import Sequence

import numpy as np

MAX_ROWS = 8


class Model:
    """A GGUF file, loaded by llama.cpp on the CPU.

    Args:
        path: the file.
        threads: number of threads.
        context: tokens of all rows together.
    """

    def __init__(self, path: str, *, threads: int, context: int):
        import llama_cpp  # here, so that the module is imported without it

        self._library = llama_cpp
        llama_cpp.llama_backend_init()
        settings = llama_cpp.llama_model_default_params()
        settings.n_gpu_layers = 0
        settings.use_extra_bufts = not path.endswith("q8_0.gguf")  # its kernels of AMX crash in some virtual machines
        self._model = llama_cpp.llama_model_load_from_file(path.encode(), settings)
        options = llama_cpp.llama_context_default_params()
        options.n_ctx = options.n_batch = context
        options.n_seq_max = MAX_ROWS
        options.kv_unified = True
        options.n_threads = options.n_threads_batch = threads
        self._context = llama_cpp.llama_init_from_model(self._model, options)
        assert self._context, "llama.cpp cannot run the file"
        self._vocab_size = llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(self._model))
        self._batch = llama_cpp.llama_batch_init(context, 0, MAX_ROWS)

    def generate(self, prompts: Sequence[Sequence[int]], n_new: int) -> tuple[float, float]:
        """Generate greedily after each prompt, and return the seconds of prefill and of all."""
        self._library.llama_memory_clear(self._library.llama_get_memory(self._context), True)
        start = time.perf_counter()
        tokens = self._read(prompts, begin=0)
        prefill_seconds = time.perf_counter() - start
        for index in range(n_new - 1):
            tokens = self._read([[token] for token in tokens], begin=len(prompts[0]) + index)
        return prefill_seconds, time.perf_counter() - start

    def _read(self, rows: Sequence[Sequence[int]], begin: int) -> list[int]:
        """Read the next tokens of each row, and return the most likely token after each."""
        batch, place = self._batch, 0
        for row, tokens in enumerate(rows):
            for position, token in enumerate(tokens, begin):
                batch.token[place], batch.pos[place] = token, position
                batch.n_seq_id[place], batch.seq_id[place][0] = 1, row
                batch.logits[place] = position == begin + len(tokens) - 1
                place += 1
        batch.n_tokens = place
        assert self._library.llama_decode(self._context, batch) == 0
        logits = self._library.llama_get_logits(self._context)
        return np.ctypeslib.as_array(logits, shape=(len(rows), self._vocab_size)).argmax(axis=1).tolist()


def main() -> None:
    """Answer requests until stdin is closed."""
    path, threads, context = sys.argv[1:]
    model = Model(path, threads=int(threads), context=int(context))
    for line in sys.stdin:
        request = json.loads(line)
        print(json.dumps(model.generate(request["prompts"], request["n_new"])), flush=True)


if __name__ == "__main__":
    main()
