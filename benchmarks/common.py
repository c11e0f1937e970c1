"""Shared parts of the benchmarks: inputs that every machine has, synthetic corpora, interleaved repeats."""

import json
import resource
import statistics
import subprocess
import sysconfig
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, TypeVar

from gpt.configs.run_plan import CorpusFacts, StreamFacts, resolve
from gpt.configs.train_config import TrainConfig
from gpt.data.manifest import CORPUS_FORMAT_VERSION, CorpusManifest, SourceEntry
from gpt.data.shards import ShardInfo
from gpt.data.tokenizer import TOKENIZER_FILE
from gpt.data.tokenizer_builders import build_byte_tokenizer

if TYPE_CHECKING:
    from gpt.utils.distributed import DistContext

SYNTHETIC_VOCAB_SIZE = 4096
Name = TypeVar("Name")
Measurement = TypeVar("Measurement")
"""Result of one repeat: seconds, or a record."""


def read_standard_library() -> list[str]:
    """Return Python's own source files with their tests, without installed packages: about 30 MB, no download."""
    root = Path(sysconfig.get_path("stdlib"))
    texts = []
    for path in sorted(root.rglob("*.py")):
        if not {"site-packages", "dist-packages"}.intersection(path.parts):
            try:
                texts.append(path.read_text(encoding="utf-8"))
            except UnicodeDecodeError:  # a test of other encodings
                continue
    return [text for text in texts if text]


def iterate_documents() -> Iterator[str]:
    """Yield the files of the standard library endlessly, in each round with a different first line."""
    texts, copy = read_standard_library(), 0
    while True:
        for number, text in enumerate(texts):
            yield f"# copy {copy} of file {number}\n{text}"
        copy += 1


def write_input(path: Path, size: int, kind: str) -> int:
    """Write documents to `path` until it has `size` bytes.

    Args:
        path: output file.
        size: target size in bytes; the last document may exceed it.
        kind: jsonl (one object with a key `text` per line) or text (concatenated).

    Returns:
        Size of the file in bytes.
    """
    written = 0
    with path.open("wb") as file:
        for text in iterate_documents():
            written += file.write((json.dumps({"text": text}) + "\n" if kind == "jsonl" else text).encode())
            if written >= size:
                return written
    raise AssertionError("iterate_documents is endless")


def write_manifest(folder: Path, shards: Sequence[ShardInfo]) -> None:
    """Turn a folder of training shards of bytes into a prepared corpus."""
    tokenizer = build_byte_tokenizer()
    (folder / TOKENIZER_FILE).write_text(tokenizer.definition, encoding="utf-8")
    CorpusManifest(
        format_version=CORPUS_FORMAT_VERSION,
        settings={},
        tokenizer_sha256=tokenizer.sha256,
        vocab_size=tokenizer.vocab_size,
        special_ids=tokenizer.special_ids,
        dtype="uint16",
        largest_id=max(shard.largest_id for shard in shards),
        documents=sum(shard.documents for shard in shards),
        tokens=sum(shard.tokens for shard in shards),
        text_bytes=sum(shard.text_bytes for shard in shards),
        sources=(SourceEntry(name="synthetic", sha256="0" * 64, train=tuple(shards), val=()),),
        xz_bits_per_byte=None,
    ).write(folder)


def build_step_function(config: TrainConfig, dist: "DistContext") -> Callable[[], None]:
    """Return a function that takes the next training step of a run on synthetic tokens."""
    from gpt.data.data_loader import DataLoader
    from gpt.data.synthetic import SyntheticTokens
    from gpt.machine.hardware import detect_machine
    from gpt.pipeline import build_state, build_train_step
    from gpt.training.step_timer import StepTimer

    machine = detect_machine(dist.device.type, dist.world_size)
    plan = resolve(config, machine, CorpusFacts(SYNTHETIC_VOCAB_SIZE, (StreamFacts("synthetic tokens", 10**12),)))
    tokens = SyntheticTokens(SYNTHETIC_VOCAB_SIZE, plan.batch.block_size, document_mask=False)
    loader = DataLoader(tokens, plan.batch, rank=dist.rank, device=dist.device)
    state, timer = build_state(config, plan, dist), StepTimer(dist.device)
    train_step, _ = build_train_step(config, plan, dist, state, loader, timer)
    steps = count()

    def take_step() -> None:
        train_step(next(steps))

    return take_step


@dataclass(frozen=True)
class Cost:
    """Cost of one program."""

    seconds: float
    cpu_seconds: float
    """CPU time of all its processes; other programs on the machine hardly change it."""


def measure_program(
    command: Sequence[str | Path],
    env: dict[str, str] | None = None,
    *,
    cwd: Path | None = None,
    stdout: IO[str] | None = None,
) -> Cost:
    """Measure a program from its start to its end.

    Args:
        command: program and arguments.
        env: environment; None: that of this process.
        cwd: working directory; None: that of this process.
        stdout: file for the output; None: the output is part of the error if the program fails.

    Raises:
        RuntimeError: the program failed; the message holds its output.
    """
    start, before = time.perf_counter(), _cpu_seconds()
    done = subprocess.run(
        [str(part) for part in command],
        env=env,
        cwd=cwd,
        stdout=stdout or subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    cost = Cost(time.perf_counter() - start, _cpu_seconds() - before)
    if done.returncode:
        raise RuntimeError(f"{command} ended with status {done.returncode}:\n{done.stdout or ''}{done.stderr}")
    return cost


def _cpu_seconds() -> float:
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


def run_interleaved(
    contenders: dict[Name, Callable[[], Measurement]], repeats: dict[Name, int]
) -> dict[Name, list[Measurement]]:
    """Run contenders alternately, so that other load on the machine affects all of them equally.

    Args:
        contenders: name -> function that runs and measures once.
        repeats: name -> number of repeats.

    Returns:
        Name -> measurement of each repeat.
    """
    measurements: dict[Name, list[Measurement]] = {name: [] for name in contenders}
    for turn in range(max(repeats.values())):
        for name, run in contenders.items():
            if turn < repeats[name]:
                measurements[name].append(run())
    return measurements


def format_spread(values: Sequence[float], unit: str = "", digits: int = 2) -> str:
    """Format median, minimum, maximum and count."""
    low, middle, high = min(values), statistics.median(values), max(values)
    return f"{middle:.{digits}f}{unit} ({low:.{digits}f} to {high:.{digits}f}, n={len(values)})"


def format_machine(result: dict[str, Any]) -> str:
    """Format the machine and the versions of a result."""
    machine = result["machine"]
    versions = f"torch {machine['libraries']['torch']}, Python {machine['python']}"
    return f"{machine['cpu']}, {machine['cpu_capability']}, {versions}."


def format_verdict(value: float, limit: float, *, at_least: bool) -> str:
    """Format a requirement and whether `value` meets it."""
    met = value >= limit if at_least else value <= limit
    return f"{'at least' if at_least else 'at most'} {limit:g}: {'met' if met else 'MISSED'}"
