"""What the benchmarks share: inputs that every machine has, made-up corpora, and medians of interleaved repeats."""

import json
import resource
import statistics
import subprocess
import sysconfig
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, TypeVar

from gpt.data.manifest import CORPUS_FORMAT_VERSION, TOKENIZER_FILE, CorpusManifest, SourceEntry
from gpt.data.shards import ShardInfo
from gpt.data.tokenizer_builders import build_byte_tokenizer

Name = TypeVar("Name")
Taken = TypeVar("Taken")
"""What a run took: seconds, or more than that."""


def standard_library() -> list[str]:
    """Python's own sources, tests included and installed packages not: some thirty megabytes that need no download."""
    root = Path(sysconfig.get_path("stdlib"))
    texts = []
    for path in sorted(root.rglob("*.py")):
        if not {"site-packages", "dist-packages"}.intersection(path.parts):
            try:
                texts.append(path.read_text(encoding="utf-8"))
            except UnicodeDecodeError:  # a test of other encodings
                continue
    return [text for text in texts if text]


def documents() -> Iterator[str]:
    """The standard library's files again and again, each time under another first line."""
    texts, copy = standard_library(), 0
    while True:
        for number, text in enumerate(texts):
            yield f"# copy {copy} of file {number}\n{text}"
        copy += 1


def write_input(path: Path, size: int, kind: str) -> int:
    """Write documents to `path` until it has `size` bytes.

    Args:
        path: the file.
        size: bytes, to within a document.
        kind: jsonl, an object with a key `text` a line, or text, one after the other.

    Returns:
        Bytes of the file.
    """
    done = 0
    with path.open("wb") as file:
        for text in documents():
            done += file.write((json.dumps({"text": text}) + "\n" if kind == "jsonl" else text).encode())
            if done >= size:
                return done
    raise AssertionError("there is no end of documents")


def write_manifest(folder: Path, shards: Sequence[ShardInfo]) -> None:
    """Make a prepared corpus of training shards of bytes that lie in `folder`."""
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
        sources=(SourceEntry(name="made-up", sha256="0" * 64, train=tuple(shards), val=()),),
        xz_bits_per_byte=None,
    ).write(folder)


@dataclass(frozen=True)
class Cost:
    """What one run took."""

    seconds: float
    cpu_seconds: float
    """Of all its processes; what others do on the machine hardly changes it."""


def cost_of(
    command: Sequence[str | Path],
    env: dict[str, str] | None = None,
    *,
    cwd: Path | None = None,
    stdout: IO[str] | None = None,
) -> Cost:
    """What a program takes from its start to its end.

    Args:
        command: the program and its arguments.
        env: its environment; None: ours.
        cwd: the folder that it runs in; None: ours.
        stdout: file for what it prints; None: told only if it fails.

    Raises:
        RuntimeError: it failed; holds what it wrote.
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
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def interleaved(contenders: dict[Name, Callable[[], Taken]], repeats: dict[Name, int]) -> dict[Name, list[Taken]]:
    """Measure in turn, so that whatever else the machine does meets all of them alike.

    Args:
        contenders: by name what runs once.
        repeats: by name how often.

    Returns:
        What each took, by name.
    """
    costs: dict[Name, list[Taken]] = {name: [] for name in contenders}
    for turn in range(max(repeats.values())):
        for name, run in contenders.items():
            if turn < repeats[name]:
                costs[name].append(run())
    return costs


def spread(values: Sequence[float], unit: str = "", digits: int = 2) -> str:
    """Median, minimum and maximum in words."""
    low, middle, high = min(values), statistics.median(values), max(values)
    return f"{middle:.{digits}f}{unit} ({low:.{digits}f} to {high:.{digits}f}, n={len(values)})"


def verdict(value: float, limit: float, *, at_least: bool) -> str:
    """Whether a value keeps a requirement."""
    kept = value >= limit if at_least else value <= limit
    return f"{'at least' if at_least else 'at most'} {limit:g}: {'met' if kept else 'MISSED'}"
