"""Long soak tests: thousands of kills, flipped bits and mutated inputs. `pytest -m soak -s` prints the figures.

`--soak-scale 0.1` does a tenth of the work.
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
from gpt.data.prepare.records import Records
from gpt.data.tokenizer import Tokenizer
from gpt.errors import UserError
from gpt.main import main
from gpt.resume.journal import read_journal
from gpt.utils.atomic_io import read_jsonl
from tests.checkpoint.test_store import make_state, trained_state, write_checkpoint
from tests.conftest import make_text, read_documents
from tests.faults.test_damage import sign, write_signed

pytestmark = pytest.mark.soak

KILLS_PER_RUN = 50
N_RUNS = 20
"""Runs of `gpt verify-resume`, one in four of them with two ranks: 1,000 kills in all."""
STEPS_PER_KILL = 15
"""Steps of a run for each of its kills; on a busy machine a kill comes some steps late."""
N_FLIPS = 10_000
N_MUTATIONS = 20_000
N_MUTATED_RUN_FOLDERS = 400
"""Mutations that are tried by starting `gpt train` on the folder; the others go to the function that reads the file."""
MAX_READ_SECONDS = 2.0
"""Time within which a mutated input must be read or refused."""

VARIANTS = [
    ["--checkpoint.keep-best", "--model.dropout", "0.1"],
    ["--checkpoint.no-asynchronous", "--optimizer.name", "muon"],
    ["--dtype", "bfloat16", "--data.packing", "best-fit", "--data.document-mask"],
    [],
    [
        *("--spike.rollback", "--spike.window", "16", "--spike.threshold", "2", "--spike.least-rise", "0.02"),
        *("--spike.max-rollbacks", "100000"),
    ],
]
"""Settings of four runs each, one of them with two ranks."""


@pytest.fixture
def scale(request: pytest.FixtureRequest) -> float:
    return float(request.config.getoption("--soak-scale"))


def print_figures(capfd: pytest.CaptureFixture[str], figures: str) -> None:
    with capfd.disabled():
        print(f"\n{figures}")


@pytest.mark.parametrize("seed", range(N_RUNS))
def test_killed_run_is_bit_exact(
    seed: int, scale: float, cache_dir: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    ranks = 2 if seed % 4 == 3 else 1
    settings = VARIANTS[seed // 4 % len(VARIANTS)]
    (tmp_path / "text.txt").write_text("\n\n".join(make_text(100, index) for index in range(60)))  # an epoch: ~60 steps
    n_kills = max(1, round(scale * KILLS_PER_RUN))
    started = time.monotonic()
    status = verify_resume(
        [
            *("debug", "--device", "cpu", "--model.n-embd", "16", "--sample.max-new-tokens", "4"),
            *("--micro-batch-size", "2", "--checkpoint.interval", "5", "--eval.interval", "7"),
            *("--data.source", str(tmp_path / "text.txt"), "--data.cache-dir", str(cache_dir)),
            *("--run-dir", str(tmp_path / "run"), "--ranks", str(ranks), "--kills", str(n_kills)),
            *("--kill-seed", str(seed), "--seed", str(seed), *settings),
            *("--max-steps", str(STEPS_PER_KILL * n_kills)),
        ]
    )
    output = capfd.readouterr().out
    assert status == 0, output
    phases = Counter(re.findall(r"^kill \d+: (.*?), after", output, re.MULTILINE))
    assert sum(phases.values()) >= 0.9 * n_kills, output  # a short run may finish before the last kills
    rollbacks = int(re.findall(r"(\d+) rollbacks?", output)[0]) if "--spike.rollback" in settings else 0
    assert rollbacks >= 3 * scale or "--spike.rollback" not in settings, output
    max_lost_steps = re.findall(r"most steps lost by a kill: (\d+)", output)[0]
    seconds = time.monotonic() - started
    print_figures(
        capfd,
        f"kills, {ranks} rank(s): {dict(phases)}; {rollbacks} rollbacks; most steps lost {max_lost_steps}; "
        f"{seconds:.0f} s; 0 differing bits",
    )


def test_every_flipped_bit_is_found(scale: float, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    step = tmp_path / "step"
    write_checkpoint(step, trained_state(n_embd=32), '{"seed": 1}', {"val/loss": 1.5})
    files = {path: path.read_bytes() for path in sorted(step.iterdir())}
    generator, n_flips, started = random.Random(0), round(scale * N_FLIPS), time.monotonic()
    for number in range(n_flips):
        path = list(files)[number % len(files)]  # each file equally often, since tensors hold most of the bits
        bit = generator.randrange(8 * len(files[path]))
        content = bytearray(files[path])
        content[bit // 8] ^= 1 << bit % 8
        path.write_bytes(content)
        with pytest.raises(UserError):
            verify(step)
        path.write_bytes(files[path])
    verify(step)
    print_figures(capfd, f"flipped bits: {n_flips:,}, all found; {time.monotonic() - started:.0f} s")


ODD_VALUES = [
    -1,
    0,
    2**63,
    2**64,
    10**400,
    1e308,
    -0.0,
    float("nan"),
    None,
    True,
    "",
    "\0",
    "../x",
    "\ud800",
    [],
    {},
    [[]],
]


def mutate(content: bytes, generator: random.Random) -> bytes:
    """Change bits, slices or numbers of the bytes, or a value or key if they are JSON."""
    if generator.random() < 0.4:
        with contextlib.suppress(ValueError):
            return mutate_json(json.loads(content), generator)
    changed = bytearray(content)
    for _ in range(generator.choice([1, 1, 1, 2, 5, 50])):
        at = generator.randrange(len(changed) + 1)
        until = min(len(changed), at + generator.choice([1, 4, 100, 10_000]))
        match generator.randrange(6):
            case 0:
                changed[at:at] = generator.randbytes(generator.choice([1, 8, 300]))
            case 1:
                del changed[at:until]
            case 2:
                changed[at:at] = changed[at:until]
            case 3:
                del changed[at:]
            case 4:
                numbers = list(re.finditer(rb"\d+", changed))
                if numbers:
                    number = generator.choice(numbers)
                    changed[number.start() : number.end()] = json.dumps(generator.choice(ODD_VALUES)).encode()
            case 5 if at < len(changed):
                changed[at] ^= 1 << generator.randrange(8)
    return bytes(changed)


def mutate_json(value: Any, generator: random.Random) -> bytes:
    """Replace or delete a random leaf or branch of a JSON value, and return it as text."""
    holder, at = value, None
    while isinstance(holder, (dict, list)) and holder:
        at = generator.choice(list(holder) if isinstance(holder, dict) else range(len(holder)))
        if not isinstance(holder[at], (dict, list)) or not holder[at] or generator.random() < 0.2:
            break
        holder = holder[at]
    if at is None:
        return json.dumps(generator.choice(ODD_VALUES)).encode()
    if generator.random() < 0.2:
        del holder[at]
    else:
        holder[at] = generator.choice(ODD_VALUES)
    return json.dumps(value).encode()


@contextmanager
def limit_time(seconds: float) -> Iterator[None]:
    """Fail if the block takes longer, and interrupt it after five times as long."""

    def expire(*_: object) -> None:
        raise AssertionError("the reader hangs")

    before = signal.signal(signal.SIGALRM, expire)
    signal.setitimer(signal.ITIMER_REAL, 5 * seconds)
    started = time.monotonic()
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
    assert time.monotonic() - started < seconds


def assert_mutations_are_read_or_refused(
    name: str, content: bytes, read: Callable[[bytes], object], n_mutations: int, capfd: Any
) -> None:
    """Check that each mutation of a content gives a result or is refused in one line."""
    n_refused, max_seconds, started = 0, 0.0, time.monotonic()
    for number in range(n_mutations):
        generator = random.Random(f"{name} {number}")
        mutation = mutate(content, generator)
        before = time.monotonic()
        try:
            with limit_time(MAX_READ_SECONDS):
                read(mutation)
        except UserError as error:
            n_refused += 1
            assert "\n" not in str(error), f"{name} {number}: {error}"
        except BaseException as error:
            raise AssertionError(f"{name}, mutation {number}: {type(error).__name__}: {error}") from error
        max_seconds = max(max_seconds, time.monotonic() - before)
        assert (stderr := capfd.readouterr().err) == "", f"{name}, mutation {number}: {stderr}"
    seconds = time.monotonic() - started
    print_figures(
        capfd,
        f"mutated {name}: {n_mutations:,}, {n_refused:,} refused in one line; "
        f"longest {max_seconds:.2f} s; {seconds:.0f} s",
    )


INPUTS = [
    *(
        "flags",
        "config.json",
        "manifest.json",
        "manifest.json with correct digests",
        "progress.json with correct digests",
    ),
    *("model.safetensors", "metrics.jsonl", "journal.jsonl", "tokenizer.json", "corpus.json", "shard"),
    *("text", "JSON lines"),
]


@pytest.mark.parametrize("name", INPUTS)
def test_mutated_input_is_read_or_refused_in_one_line(
    name: str, scale: float, finished_run: Path, cache_dir: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    content, read = make_reader(name, finished_run, cache_dir, tmp_path)
    read(content)
    assert_mutations_are_read_or_refused(
        name, content, read, round(scale * (N_MUTATIONS - N_MUTATED_RUN_FOLDERS) / len(INPUTS)), capfd
    )


def make_reader(
    name: str, finished_run: Path, cache_dir: Path, tmp_path: Path
) -> tuple[bytes, Callable[[bytes], object]]:
    """Return a valid input of the kind `name`, and a function that reads a mutation of it as the program does."""
    file, step = tmp_path / "input", tmp_path / "step"
    write_checkpoint(step, trained_state(scaled=True), "{}", {"val/loss": 1.5})
    valid = {path.name: path.read_bytes() for path in step.iterdir()}

    def read_as_file(read_file: Callable[[Path], object]) -> Callable[[bytes], object]:
        def read(content: bytes) -> object:
            file.write_bytes(content)
            return read_file(file)

        return read

    def read_in_checkpoint(file_name: str, load: Callable[[], object]) -> tuple[bytes, Callable[[bytes], object]]:
        def read(content: bytes) -> object:
            for valid_name, valid_content in valid.items():
                (step / valid_name).write_bytes(valid_content)
            (step / file_name).write_bytes(content)
            return load()

        return valid[file_name], read

    def verify_signed_manifest() -> None:
        with contextlib.suppress(ValueError, AttributeError, TypeError):  # no JSON object: it is verified as it is
            content = json.loads((step / CHECKPOINT_MANIFEST).read_text(encoding="utf-8"))
            write_signed(step, content)
        verify(step)

    def load_signed_progress() -> None:
        sign(step)
        verify_and_load(step, make_state(1, scaled=True))

    match name:
        case "flags":
            words = "debug\t--max-steps\t7\t--lr.max-lr\t0.01\t--data.source\ta\tb\t--checkpoint.keep\t3\t--dry-run"
            return words.encode(), lambda content: parse_train(content.decode(errors="surrogateescape").split("\t"))
        case "config.json":
            return (finished_run / name).read_bytes(), read_as_file(load_config)
        case "manifest.json":
            return read_in_checkpoint(CHECKPOINT_MANIFEST, lambda: verify(step))
        case "manifest.json with correct digests":
            return read_in_checkpoint(CHECKPOINT_MANIFEST, verify_signed_manifest)
        case "progress.json with correct digests":
            return read_in_checkpoint(PROGRESS, load_signed_progress)
        case "model.safetensors":
            return valid[MODEL], read_as_file(read_tensors)
        case "metrics.jsonl":
            return (finished_run / name).read_bytes(), read_as_file(lambda path: list(read_jsonl(path)))
        case "journal.jsonl":
            record = {"order": "a", "quarantined": {"7": "spike"}, "to_step": 5, "reason": "a spike"}
            return json.dumps(record).encode() + b"\n", read_as_file(lambda path: read_journal(path, "a"))
        case "tokenizer.json":
            return (finished_run / name).read_bytes(), read_as_file(
                lambda path: (tokenizer := Tokenizer.from_file(path)).decode(tokenizer.encode("a text").tolist())
            )
        case "text" | "JSON lines":
            text = make_text(500) if name == "text" else "".join(json.dumps({"text": make_text(30)}) + "\n" * 9)
            file = file.with_suffix(".txt" if name == "text" else ".jsonl")
            return text.encode(), read_as_file(lambda path: read_documents(path, Records("text", skip_bad=False)))
    return make_corpus_reader(name, cache_dir, tmp_path)


def make_corpus_reader(name: str, cache_dir: Path, tmp_path: Path) -> tuple[bytes, Callable[[bytes], object]]:
    """Return a file of a prepared corpus, and a function that reads all tokens of the corpus with a mutation of it."""
    prepared = next(path.parent for path in cache_dir.glob("*/corpus.json"))
    corpus = Path(shutil.copytree(prepared, tmp_path / "corpus"))
    file = next(corpus.glob("corpus.json" if name == "corpus.json" else "train-*.safetensors"))

    def read(content: bytes) -> object:
        file.write_bytes(content)
        corpus_with_mutation = open_corpus([corpus], DataConfig(), block_size=16)
        streams = (*corpus_with_mutation.train.values(), *corpus_with_mutation.val.values())
        return [np.asarray(stream.read(0, len(stream))).sum() for stream in streams]

    return file.read_bytes(), read


def test_mutated_run_folder_is_trained_on_or_refused_in_one_line(
    scale: float, finished_run: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """Start `gpt train` on copies of a finished run with one mutated file each."""
    statuses: Counter[int] = Counter()
    names = sorted(path.relative_to(finished_run) for path in finished_run.rglob("*") if path.is_file())
    n_folders, started = round(scale * N_MUTATED_RUN_FOLDERS), time.monotonic()
    for number in range(n_folders):
        generator = random.Random(number)
        folder = Path(shutil.copytree(finished_run, tmp_path / str(number)))
        file = folder / generator.choice(names)
        file.write_bytes(mutate(file.read_bytes(), generator))
        stderr = io.StringIO()
        config = ["--config", str(finished_run / "config.json"), "--run-dir", str(folder), "--max-steps", "9"]
        with contextlib.redirect_stderr(stderr), limit_time(10 * MAX_READ_SECONDS):
            status = main(["train", *config])
        errors = [line for line in stderr.getvalue().splitlines() if line.startswith("gpt: error: ")]
        assert (status, len(errors)) in ((0, 0), (2, 1)), f"{file}: {status}: {stderr.getvalue()}"
        if status == 0:
            verify(RunFolder(folder).list_checkpoints()[-1])
        statuses[status] += 1
        shutil.rmtree(folder)
    capfd.readouterr()
    print_figures(
        capfd,
        f"mutated run folders: {n_folders:,}, {dict(statuses)} by exit status; {time.monotonic() - started:.0f} s",
    )
