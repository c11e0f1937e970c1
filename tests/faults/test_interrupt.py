"""Ctrl-C in every phase of the program: it ends at once, with status 130 and one line."""

import os
import pty
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import pytest

from gpt.configs.train_config import TrainConfig
from gpt.utils.process_tree import list_descendants, read_stat
from tests.conftest import make_text

pytestmark = [pytest.mark.faults, pytest.mark.skipif(sys.platform != "linux", reason="needs /proc")]

Configure = Callable[..., TrainConfig]
STANDSTILL = """
import hashlib, importlib, os, pathlib, sys
sys.argv = ["gpt", *sys.argv[3:]]
from gpt.utils.interrupts import answer_interrupts
answer_interrupts()
module, _, name = {place!r}.rpartition(":")
owner = importlib.import_module(module)
*path, name = name.split(".")
for part in path:
    owner = getattr(owner, part)
original = getattr(owner, name)

def stand_still(*args, **kwargs):
    "Be in C code, which no signal interrupts."
    pathlib.Path({marker!r}).touch()
    {work}

setattr(owner, name, stand_still)
from gpt.main import program
program()
"""
"""Program whose main thread does not come back from one function."""
FOREVER = 'hashlib.pbkdf2_hmac("sha256", b"", b"", 10**9)'
ANSWER_SECONDS = 1.0


def limit_seconds() -> float:
    """Return the time for an answer, scaled by the machine's load."""
    return ANSWER_SECONDS * (1 + os.getloadavg()[0] / (os.cpu_count() or 1))


@contextmanager
def start(command: Sequence[str]) -> Iterator[subprocess.Popen[str]]:
    """Start a program in a session of its own, whose group gets signals as from a terminal."""
    process = subprocess.Popen(
        [sys.executable, *command], env=os.environ | {"OMP_NUM_THREADS": "1"}, start_new_session=True,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    try:
        yield process
    finally:
        process.kill()
        process.wait()


def assert_interrupt_ends_all(process: subprocess.Popen[str]) -> None:
    """Send Ctrl-C, and assert that everything has ended in time with the one line."""
    children = list_descendants(process.pid)
    os.killpg(process.pid, signal.SIGINT)
    started = time.monotonic()
    _, stderr = process.communicate(timeout=60)
    seconds = time.monotonic() - started
    assert process.returncode == 130, stderr
    lines = [line for line in stderr.splitlines() if not line.startswith("gpt: stopping")]
    assert lines == ["gpt: interrupted"]
    assert seconds < limit_seconds()
    while any((stat := read_stat(pid)) is not None and stat[0] != "Z" for pid in children):
        assert time.monotonic() - started < 5 * limit_seconds()  # a killed process needs a moment to end
        time.sleep(0.01)


def wait_for(condition: Callable[[], bool], process: subprocess.Popen[str]) -> None:
    deadline = time.monotonic() + 120
    while not condition():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.01)


def blocks_interrupts(pid: int) -> bool:
    line = next(line for line in Path(f"/proc/{pid}/status").read_text().splitlines() if line.startswith("SigBlk"))
    return bool(int(line.split()[1], 16) & 1 << signal.SIGINT - 1)


def standing_still(place: str, tmp_path: Path, arguments: Sequence[str], work: str = FOREVER) -> list[str]:
    program = STANDSTILL.format(place=place, marker=str(tmp_path / "marker"), work=work)
    return ["-c", program, "-", "-", *arguments]


@pytest.fixture
def config(tiny: Configure, tmp_path: Path) -> list[str]:
    (tmp_path / "config.json").write_text(tiny(tmp_path / "run").saved_json())
    return ["train", "--config", str(tmp_path / "config.json")]


def test_interrupt_during_the_imports() -> None:
    for delay in (0.0, 0.1, 0.4):
        with start(["-m", "gpt", "train", "--help"] if delay < 0.4 else ["-m", "gpt", "bench"]) as process:
            wait_for(lambda: blocks_interrupts(process.pid), process)
            time.sleep(delay)
            assert_interrupt_ends_all(process)


@pytest.mark.parametrize(
    "place",
    [
        "gpt.run:open_machine",
        "gpt.run:claim_start",
        "gpt.run:load_corpus",
        "gpt.run:resolve_auto_micro_batch",
        "gpt.pipeline:build_state",
        "gpt.pipeline:restore_state",
        "gpt.pipeline:write_run_files",
        "gpt.pipeline:require_right_arithmetic",
        "gpt.pipeline:find_peak_flops",
    ],
)
def test_interrupt_before_the_first_step(place: str, config: list[str], tmp_path: Path) -> None:
    with start(standing_still(place, tmp_path, config)) as process:
        wait_for((tmp_path / "marker").exists, process)
        assert_interrupt_ends_all(process)


@pytest.mark.parametrize(
    "place",
    [
        "gpt.training.train_step:TrainStep.__call__",
        "gpt.evaluation.val_loss:ValLoss.run",
        "gpt.training.observers.text_sampler:TextSampler._generate",
        "gpt.checkpoint.staging:Staging.copy",
    ],
)
def test_second_interrupt_leaves_a_run_at_once_and_the_first_says_so(
    place: str, config: list[str], tmp_path: Path
) -> None:
    with start(standing_still(place, tmp_path, config)) as process:
        wait_for((tmp_path / "marker").exists, process)
        os.killpg(process.pid, signal.SIGINT)
        assert process.stderr is not None
        assert process.stderr.readline() == "gpt: stopping after this step; a second Ctrl-C leaves at once\n"
        assert_interrupt_ends_all(process)


def test_interrupt_between_steps_saves_and_ends_with_130(tiny: Configure, tmp_path: Path) -> None:
    config = tiny(tmp_path / "run", max_steps=100_000, eval={"interval": 0})
    (tmp_path / "config.json").write_text(config.saved_json())
    with start(["-m", "gpt", "train", "--config", str(tmp_path / "config.json")]) as process:
        wait_for((tmp_path / "run/metrics.jsonl").exists, process)
        os.killpg(process.pid, signal.SIGINT)
        started = time.monotonic()
        stdout, stderr = process.communicate(timeout=60)
        assert time.monotonic() - started < limit_seconds()
    assert (process.returncode, stderr.count("\n")) == (130, 1)
    assert "SIGINT at step" in stdout
    assert list((tmp_path / "run/checkpoints").glob("step_*"))


def test_interrupt_while_a_tokenizer_is_learned(tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text(
        "".join(make_text(20_000, seed).replace("a", chr(0x100 + seed)) for seed in range(90))
    )
    prepare = ["prepare", str(tmp_path / "text.txt"), "--tokenizer", "bpe", "--out", str(tmp_path / "corpus")]
    place = "gpt.data.prepare.learn_tokenizer:train_bpe_tokenizer"
    work = "return original([text * 30 for text in args[0]], *args[1:])"
    with start(standing_still(place, tmp_path, prepare, work)) as process:
        wait_for((tmp_path / "marker").exists, process)
        time.sleep(0.5)
        assert_interrupt_ends_all(process)


def test_interrupt_while_the_model_is_compiled_prints_nothing_of_the_compilers(
    tiny: Configure, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "inductor"))
    (tmp_path / "config.json").write_text(tiny(tmp_path / "run", compile=True).saved_json())
    place, work = "gpt.pipeline:compile_or_fall_back", "return original(*args, **kwargs)"
    train = ["train", "--config", str(tmp_path / "config.json")]
    with start(standing_still(place, tmp_path, train, work)) as process:
        wait_for((tmp_path / "marker").exists, process)
        wait_for(lambda: any("g++" in read_command(pid) for pid in list_descendants(process.pid)), process)
        assert_interrupt_ends_all(process)


def read_command(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/cmdline").read_text()
    except OSError:
        return ""


@pytest.mark.parametrize(
    ("place", "arguments"),
    [
        ("gpt.inference.load:read_weights", ["sample"]),
        ("gpt.inference.load:require_right_arithmetic", ["sample"]),
        ("gpt.inference.generate:sample_next_token", ["sample"]),
        ("gpt.checkpoint.manifest:sha256_of_file", ["verify"]),
    ],
)
def test_interrupt_of_sample_and_verify(place: str, arguments: list[str], finished_run: Path, tmp_path: Path) -> None:
    with start(standing_still(place, tmp_path, [*arguments, str(finished_run)])) as process:
        wait_for((tmp_path / "marker").exists, process)
        assert_interrupt_ends_all(process)


def test_interrupt_ends_the_runs_of_verify_resume(tiny: Configure, tmp_path: Path) -> None:
    config = tiny(tmp_path / "run", max_steps=100_000, eval={"interval": 0})
    (tmp_path / "config.json").write_text(config.saved_json())
    with start(["-m", "gpt", "verify-resume", "--config", str(tmp_path / "config.json")]) as process:
        wait_for((tmp_path / "run-verify-resume/reference/metrics.jsonl").exists, process)
        assert_interrupt_ends_all(process)


def test_program_that_ignores_interrupts_from_its_start_goes_on() -> None:
    program = """
import os, signal, time
from gpt.utils.interrupts import answer_interrupts
signal.signal(signal.SIGINT, signal.SIG_IGN)
answer_interrupts()
os.kill(os.getpid(), signal.SIGINT)
time.sleep(0.5)
print("alive")
"""
    with start(["-c", program]) as process:
        assert process.communicate(timeout=60) == ("alive\n", "")


@pytest.mark.parametrize(("term", "erase"), [("xterm", b"\x1b[2K"), ("dumb", b"")])
def test_interrupt_erases_the_line_that_the_terminal_shows(term: str, erase: bytes) -> None:
    program = "import os; from gpt.utils.interrupts import interrupt; os.write(2, b'a bar ^C'); interrupt()"
    terminal, stderr = pty.openpty()
    with os.fdopen(terminal, "rb", buffering=0) as shown, os.fdopen(stderr):
        process = subprocess.run([sys.executable, "-c", program], stderr=stderr, env=os.environ | {"TERM": term})
        assert process.returncode == 130
        assert shown.read(1000) == b"a bar ^C\r" + erase + b"gpt: interrupted\r\n"
