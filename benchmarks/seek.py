"""Time and memory to the first batch at token 10^12 of a corpus of 4 * 10^12 tokens.

    python -m benchmarks.seek
    python -m benchmarks.seek --shard-tokens 2147483648

The corpus is real except for its tokens, which are all 0: one sparse shard under many names, with document offsets and
block digests, a manifest and a tokenizer. It needs a file system with sparse files and hard links, and a few megabytes
of space. A fresh process opens it; the measurement begins after the imports.
"""

import argparse
import hashlib
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch

from benchmarks.common import format_spread, format_verdict, write_manifest
from gpt.configs.batch_plan import BatchPlan
from gpt.configs.data_config import DataConfig
from gpt.data.corpus import build_sequences, open_corpus
from gpt.data.data_loader import DataLoader
from gpt.data.shards import BLOCK_BYTES, ShardInfo

POSITION = 10**12
TOKENS = 4 * 10**12
BLOCK_SIZE, BATCH = 1024, 16
DOCUMENT_TOKENS = 1024
MAX_SECONDS, MAX_MEGABYTES = 1.0, 100


def main() -> None:
    """Write the corpus, open it in fresh processes, and print medians."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shard-tokens", type=int, default=2**28, help="tokens of each shard")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--open", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.open:
        print(json.dumps(_measure_first_batch(arguments.open)))
        return
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        n_shards = _write_corpus(folder, arguments.shard_tokens)
        used = sum({file.stat().st_ino: file.stat().st_blocks * 512 for file in folder.iterdir()}.values())
        print(f"{n_shards:,} shards of {arguments.shard_tokens:,} tokens; {used / 1e6:.0f} MB on the disk")
        command = [sys.executable, "-m", "benchmarks.seek", "--open", name]
        runs = [json.loads(subprocess.check_output(command)) for _ in range(arguments.repeats)]
    limits = {"both": MAX_SECONDS, "memory": MAX_MEGABYTES}
    for name in runs[0]:
        values = [run[name] for run in runs]
        verdict = format_verdict(statistics.median(values), limits[name], at_least=False) if name in limits else ""
        print(f"  {name:32} {format_spread(values, ' MB' if 'memory' in name else ' s', 3):40} {verdict}")


def _measure_first_batch(folder: Path) -> dict[str, float]:
    """Return seconds, and megabytes on top of the imports."""
    before, start, cpu = _resident_bytes(), time.perf_counter(), time.process_time()
    config = DataConfig(source=(str(folder),))
    corpus = open_corpus([folder], config, BLOCK_SIZE)
    sequences = build_sequences(corpus, config, BLOCK_SIZE, seed=0)
    opened = time.perf_counter()
    batch = BatchPlan(micro_batch_size=BATCH, block_size=BLOCK_SIZE, world_size=1, grad_accum_steps=1)
    with DataLoader(sequences, batch, rank=0, device=torch.device("cpu")) as loader:
        inputs = loader.get_batch(POSITION // batch.tokens_per_step).micro_batches[0].inputs
        done, memory, cpu = time.perf_counter(), _peak_bytes() - before, time.process_time() - cpu
    assert inputs.shape == (BATCH, BLOCK_SIZE)
    return {
        "open": opened - start,
        "first batch": done - opened,
        "both": done - start,
        "both, CPU time": cpu,
        "memory": memory / 1e6,
        "memory, the second batch fetched": (_peak_bytes() - before) / 1e6,
    }


def _peak_bytes() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def _resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def _write_corpus(folder: Path, shard_tokens: int) -> int:
    """Write one sparse shard under many names and a manifest of all of them; return their number."""
    first = folder / "train-000000.safetensors"
    index_sha256 = _write_sparse_shard(first, shard_tokens)
    shards = []
    for number in range(-(-TOKENS // shard_tokens)):
        path = folder / f"train-{number:06d}.safetensors"
        if number:
            path.hardlink_to(first)
        shards.append(
            ShardInfo(
                file=path.name,
                sha256="0" * 64,  # digest of the whole file, which opening does not read
                index_sha256=index_sha256,
                size=first.stat().st_size,
                tokens=shard_tokens,
                documents=shard_tokens // DOCUMENT_TOKENS,
                text_bytes=shard_tokens,
                largest_id=0,
            )
        )
    write_manifest(folder, shards)
    return len(shards)


def _write_sparse_shard(path: Path, n_tokens: int) -> str:
    """Write a shard whose tokens are a hole in the file; return the digest of its index (see `gpt.data.shards`)."""
    block_digest = int.from_bytes(hashlib.sha256(bytes(BLOCK_BYTES)).digest()[:8], "little")
    offsets = np.arange(0, n_tokens + 1, DOCUMENT_TOKENS, dtype=np.uint64)
    assert offsets[-1] == n_tokens and 2 * n_tokens % BLOCK_BYTES == 0, f"give a multiple of {BLOCK_BYTES} tokens"
    arrays = {
        "document_offsets": offsets,
        "document_bytes": np.diff(offsets),
        "block_digests": np.full(2 * n_tokens // BLOCK_BYTES, block_digest, dtype=np.uint64),
    }
    header, at = {}, 0
    for name, array in arrays.items():
        header[name] = {"dtype": "U64", "shape": [len(array)], "data_offsets": [at, at := at + array.nbytes]}
    header["tokens"] = {"dtype": "U16", "shape": [n_tokens], "data_offsets": [at, at + 2 * n_tokens]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    index = b"".join([len(text).to_bytes(8, "little"), text, *(array.tobytes() for array in arrays.values())])
    with path.open("wb") as file:
        file.write(index)
        file.truncate(len(index) + 2 * n_tokens)
    return hashlib.sha256(index).hexdigest()


if __name__ == "__main__":
    main()
