"""The long soak: kills, flipped bits and mutated inputs by the thousands. `pytest -m soak -s` prints its figures.

`--soak-scale 0.1` does a tenth of it.
"""

import contextlib
import io
import json
import random
import re
import shutil
import signal
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from gpt.checkpoint.manifest import CHECKPOINT_MANIFEST, MODEL, PROGRESS, verify
from gpt.checkpoint.run_folder import RunFolder
from gpt.checkpoint.store import verify_and_load
from gpt.checkpoint.tensor_file import read_tensors
from gpt.commands.train import parse_train
from gpt.commands.verify_resume import run as verify_resume
from gpt.configs.data_config import DataConfig
from gpt.configs.load import load_config
from gpt.data.corpus import open_corpus
from gpt.data.prepare.formats import Records
from gpt.data.tokenizer import Tokenizer
from gpt.errors import UserError
from gpt.main import main
from gpt.resume.journal import read_journal
from gpt.utils.atomic_io import read_jsonl
from tests.checkpoint.test_store import make_state, trained_state, write_checkpoint
from tests.conftest import make_text, read_documents
from tests.faults.test_damage import sign, write_signed

pytestmark = pytest.mark.soak

KILLS_AT_A_TIME = 50
SHARES = 20
"""Each of KILLS_AT_A_TIME kills, one of four on two ranks: 1,000 kills in all."""
FLIPS = 10_000
MUTATIONS = 20_000
RUNS_AMONG_THEM = 400
"""Mutated run folders that `gpt train` is started on; the others are read by the function that reads such a file."""
LONGEST = 2.0
"""Seconds until a mutated input is read or refused."""

VARIANTS = [
    ["--checkpoint.keep-best", "--model.dropout", "0.1"],
    ["--checkpoint.no-asynchronous", "--optimizer.name", "muon"],
    ["--dtype", "bfloat16", "--data.packing", "best-fit", "--data.document-mask"],
    [],
]


@pytest.fixture
def scale(request: pytest.FixtureRequest) -> float:
    return float(request.config.getoption("--soak-scale"))


def tell(capfd: pytest.CaptureFixture[str], figures: str) -> None:
    with capfd.disabled():
        print(f"\n{figures}")


@pytest.mark.parametrize("share", range(SHARES))
def test_kills(share: int, scale: float, cache_dir: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    ranks = 2 if share % 4 == 3 else 1
    (tmp_path / "text.txt").write_text("\n\n".join(make_text(100, seed) for seed in range(60)))  # an epoch: ~60 steps
    kills = max(1, round(scale * KILLS_AT_A_TIME))
    started = time.monotonic()
    status = verify_resume(
        [
            *("debug", "--device", "cpu", "--model.n-embd", "16", "--sample.max-new-tokens", "4"),
            *("--micro-batch-size", "2", "--checkpoint.interval", "5", "--eval.interval", "7"),
            *("--data.source", str(tmp_path / "text.txt"), "--data.cache-dir", str(cache_dir)),
            *("--run-dir", str(tmp_path / "run"), "--ranks", str(ranks), "--kills", str(kills)),
            *("--kill-seed", str(share), "--seed", str(share), *VARIANTS[share // 4 % len(VARIANTS)]),
        ]
    )
    said = capfd.readouterr().out
    assert status == 0, said
    places = Counter(re.findall(r"^kill \d+: (.*?), after", said, re.MULTILINE))
    assert sum(places.values()) >= 0.9 * kills, said  # a short run may come to its end before the last ones
    most = re.findall(r"most steps lost by a kill: (\d+)", said)
    seconds = time.monotonic() - started
    tell(capfd, f"kills, {ranks} rank(s): {dict(places)}; most steps lost {most[0]}; {seconds:.0f} s; 0 differing bits")


def test_flipped_bits(scale: float, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    step = tmp_path / "step"
    write_checkpoint(step, trained_state(n_embd=32), '{"seed": 1}', {"val/loss": 1.5})
    files = {path: path.read_bytes() for path in sorted(step.iterdir())}
    drawn, flips, started = random.Random(0), round(scale * FLIPS), time.monotonic()
    for number in range(flips):
        path = list(files)[number % len(files)]  # each as often, for most bits are the tensors'
        bit = drawn.randrange(8 * len(files[path]))
        content = bytearray(files[path])
        content[bit // 8] ^= 1 << bit % 8
        path.write_bytes(content)
        with pytest.raises(UserError):
            verify(step)
        path.write_bytes(files[path])
    verify(step)
    tell(capfd, f"flipped bits: {flips:,}, all caught; {time.monotonic() - started:.0f} s")


ODD = [-1, 0, 2**63, 2**64, 10**400, 1e308, -0.0, float("nan"), None, True, "", "\0", "../x", "\ud800", [], {}, [[]]]


def mutated(content: bytes, drawn: random.Random) -> bytes:
    """Bytes that are no longer what they were: bits, slices, numbers, or JSON values and keys."""
    if drawn.random() < 0.4:
        with contextlib.suppress(ValueError):
            return with_odd_value(json.loads(content), drawn)
    changed = bytearray(content)
    for _ in range(drawn.choice([1, 1, 1, 2, 5, 50])):
        at = drawn.randrange(len(changed) + 1)
        until = min(len(changed), at + drawn.choice([1, 4, 100, 10_000]))
        match drawn.randrange(6):
            case 0:
                changed[at:at] = drawn.randbytes(drawn.choice([1, 8, 300]))
            case 1:
                del changed[at:until]
            case 2:
                changed[at:at] = changed[at:until]
            case 3:
                del changed[at:]
            case 4:
                numbers = list(re.finditer(rb"\d+", changed))
                if numbers:
                    number = drawn.choice(numbers)
                    changed[number.start() : number.end()] = json.dumps(drawn.choice(ODD)).encode()
            case 5 if at < len(changed):
                changed[at] ^= 1 << drawn.randrange(8)
    return bytes(changed)


def with_odd_value(value: Any, drawn: random.Random) -> bytes:
    """JSON with a leaf, a branch or a key that is not what it was."""
    holder, at = value, None
    while isinstance(holder, (dict, list)) and holder:
        at = drawn.choice(list(holder) if isinstance(holder, dict) else range(len(holder)))
        if not isinstance(holder[at], (dict, list)) or not holder[at] or drawn.random() < 0.2:
            break
        holder = holder[at]
    if at is None:
        return json.dumps(drawn.choice(ODD)).encode()
    if drawn.random() < 0.2:
        del holder[at]
    else:
        holder[at] = drawn.choice(ODD)
    return json.dumps(value).encode()


@contextmanager
def at_most(seconds: float) -> Iterator[None]:
    """What takes longer is interrupted, or told once it is over."""

    def expire(*_: object) -> None:
        raise AssertionError("it hangs")

    before = signal.signal(signal.SIGALRM, expire)
    signal.setitimer(signal.ITIMER_REAL, 5 * seconds)
    started = time.monotonic()
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
    assert time.monotonic() - started < seconds


def soaked(name: str, content: bytes, read: Callable[[bytes], object], times: int, capfd: Any) -> None:
    """Read mutations of a content: each gives a result, or one line."""
    refused, longest, started = 0, 0.0, time.monotonic()
    for number in range(times):
        drawn = random.Random(f"{name} {number}")
        change = mutated(content, drawn)
        before = time.monotonic()
        try:
            with at_most(LONGEST):
                read(change)
        except UserError as error:
            refused += 1
            assert "\n" not in str(error), f"{name} {number}: {error}"
        except BaseException as error:
            raise AssertionError(f"{name}, mutation {number}: {type(error).__name__}: {error}") from error
        longest = max(longest, time.monotonic() - before)
        assert (said := capfd.readouterr().err) == "", f"{name}, mutation {number}: {said}"
    seconds = time.monotonic() - started
    tell(capfd, f"mutated {name}: {times:,}, {refused:,} refused in one line; longest {longest:.2f} s; {seconds:.0f} s")


READERS = [
    *("flags", "config.json", "a checkpoint's manifest.json", "the same, signed", "progress.json, signed"),
    *("model.safetensors", "metrics.jsonl", "journal.jsonl", "tokenizer.json", "corpus.json", "shard"),
    *("text", "JSON lines"),
]


@pytest.mark.parametrize("name", READERS)
def test_mutated_inputs(
    name: str, scale: float, finished_run: Path, cache_dir: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    content, read = reader_of(name, finished_run, cache_dir, tmp_path)
    read(content)
    soaked(name, content, read, round(scale * (MUTATIONS - RUNS_AMONG_THEM) / len(READERS)), capfd)


def reader_of(
    name: str, finished_run: Path, cache_dir: Path, tmp_path: Path
) -> tuple[bytes, Callable[[bytes], object]]:
    """A sound input, and what reads such a one in the program."""
    file, step = tmp_path / "input", tmp_path / "step"
    write_checkpoint(step, trained_state(scaled=True), "{}", {"val/loss": 1.5})
    kept = {path.name: path.read_bytes() for path in step.iterdir()}

    def through(reads: Callable[[Path], object]) -> Callable[[bytes], object]:
        def read(content: bytes) -> object:
            file.write_bytes(content)
            return reads(file)

        return read

    def in_checkpoint(of: str, then: Callable[[], object]) -> tuple[bytes, Callable[[bytes], object]]:
        def read(content: bytes) -> object:
            for each, sound in kept.items():
                (step / each).write_bytes(sound)
            (step / of).write_bytes(content)
            return then()

        return kept[of], read

    def signed_manifest() -> None:
        with contextlib.suppress(ValueError, AttributeError, TypeError):  # no JSON object: read as it is
            content = json.loads((step / CHECKPOINT_MANIFEST).read_text(encoding="utf-8"))
            write_signed(step, content)
        verify(step)

    def signed_progress() -> None:
        sign(step)
        verify_and_load(step, make_state(1, scaled=True))

    match name:
        case "flags":
            words = "debug\t--max-steps\t7\t--lr.max-lr\t0.01\t--data.source\ta\tb\t--checkpoint.keep\t3\t--dry-run"
            return words.encode(), lambda content: parse_train(content.decode(errors="surrogateescape").split("\t"))
        case "config.json":
            return (finished_run / name).read_bytes(), through(load_config)
        case "a checkpoint's manifest.json":
            return in_checkpoint(CHECKPOINT_MANIFEST, lambda: verify(step))
        case "the same, signed":
            return in_checkpoint(CHECKPOINT_MANIFEST, signed_manifest)
        case "progress.json, signed":
            return in_checkpoint(PROGRESS, signed_progress)
        case "model.safetensors":
            return kept[MODEL], through(read_tensors)
        case "metrics.jsonl":
            return (finished_run / name).read_bytes(), through(lambda path: list(read_jsonl(path)))
        case "journal.jsonl":
            record = {"order": "a", "quarantined": {"7": "spike"}, "to_step": 5, "reason": "a spike"}
            return json.dumps(record).encode() + b"\n", through(lambda path: read_journal(path, "a"))
        case "tokenizer.json":
            return (finished_run / name).read_bytes(), through(
                lambda path: (tokenizer := Tokenizer.from_file(path)).decode(tokenizer.encode("a text").tolist())
            )
        case "text" | "JSON lines":
            text = make_text(500) if name == "text" else "".join(json.dumps({"text": make_text(30)}) + "\n" * 9)
            file = file.with_suffix(".txt" if name == "text" else ".jsonl")
            return text.encode(), through(lambda path: read_documents(path, Records("text", skip_bad=False)))
    return in_corpus(name, cache_dir, tmp_path)


def in_corpus(name: str, cache_dir: Path, tmp_path: Path) -> tuple[bytes, Callable[[bytes], object]]:
    """The file of a prepared corpus, and what opens the corpus and reads all of its tokens."""
    prepared = next(path.parent for path in cache_dir.glob("*/corpus.json"))
    corpus = Path(shutil.copytree(prepared, tmp_path / "corpus"))
    file = next(corpus.glob("corpus.json" if name == "corpus.json" else "train-*.safetensors"))

    def read(content: bytes) -> object:
        file.write_bytes(content)
        opened = open_corpus([corpus], DataConfig(), block_size=16)
        return [
            np.asarray(stream.read(0, len(stream))).sum() for stream in (*opened.train.values(), *opened.val.values())
        ]

    return file.read_bytes(), read


def test_mutated_run_folders(
    scale: float, finished_run: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """`gpt train` on a finished run with a file that is not what it was: it trains on, or says in one line why not."""
    statuses: Counter[int] = Counter()
    names = sorted(path.relative_to(finished_run) for path in finished_run.rglob("*") if path.is_file())
    times, started = round(scale * RUNS_AMONG_THEM), time.monotonic()
    for number in range(times):
        drawn = random.Random(number)
        folder = Path(shutil.copytree(finished_run, tmp_path / str(number)))
        file = folder / drawn.choice(names)
        file.write_bytes(mutated(file.read_bytes(), drawn))
        said = io.StringIO()
        config = ["--config", str(finished_run / "config.json"), "--run-dir", str(folder), "--max-steps", "9"]
        with contextlib.redirect_stderr(said), at_most(10 * LONGEST):
            status = main(["train", *config])
        errors = [line for line in said.getvalue().splitlines() if line.startswith("gpt: error: ")]
        assert (status, len(errors)) in ((0, 0), (2, 1)), f"{file}: {status}: {said.getvalue()}"
        if status == 0:
            verify(RunFolder(folder).list_checkpoints()[-1])
        statuses[status] += 1
        shutil.rmtree(folder)
    capfd.readouterr()
    tell(capfd, f"mutated run folders: {times:,}, {dict(statuses)} by exit status; {time.monotonic() - started:.0f} s")
