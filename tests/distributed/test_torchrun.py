"""Training under torchrun, on CPU with gloo."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from gpt.commands.train import parse_train
from gpt.configs.train_config import TrainConfig
from gpt.pipeline import build_trainer
from gpt.run import open_run
from tests.conftest import make_text

MAIN = Path(__file__).resolve().parents[2] / "gpt" / "main.py"
FLAGS = [
    *("train", "debug", "--device", "cpu", "--dtype", "float32", "--data.tokenizer", "byte", "--lr.max-lr", "1e-3"),
    *("--micro-batch-size", "2", "--model.dropout", "0.1", "--sample.max-new-tokens", "4"),
]


def start_torchrun(*flags: str, processes: int = 2, script: Path | None = None) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        [*command, *([str(script)] if script else [str(MAIN), *FLAGS]), *flags],
        env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip


def read_metric(run_dir: Path, key: str) -> dict[int, float]:
    lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    return {line["step"]: line[key] for line in lines if key in line}


@pytest.fixture(scope="module")
def runs(text_file: Path, cache_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[int, tuple[Path, str]]:
    """Train for 100 steps in float32 with one and with two ranks, and return each run's folder and output."""
    results = {}
    for processes in (1, 2):
        run_dir = tmp_path_factory.mktemp("world") / str(processes)
        process = start_torchrun(
            *("--run-dir", str(run_dir), "--max-steps", "100", "--eval.interval", "50"),
            *("--data.source", str(text_file), "--data.cache-dir", str(cache_dir), "--lr.decay-steps", "95"),
            processes=processes,
        )
        output, _ = process.communicate(timeout=120)
        assert process.returncode == 0, output
        results[processes] = run_dir, output
    return results


def test_two_ranks_train_like_one(runs: dict[int, tuple[Path, str]]) -> None:
    one, two = (read_metric(runs[n][0], "train/loss") for n in (1, 2))
    assert list(one) == list(range(1, 101))
    assert one.keys() == two.keys()
    assert max(abs(one[step] - two[step]) for step in one) < 2e-6
    assert one[100] < one[1] - 0.5


def test_two_ranks_evaluate_like_one(runs: dict[int, tuple[Path, str]]) -> None:
    one, two = (read_metric(runs[n][0], "val/loss") for n in (1, 2))
    assert one.keys() == two.keys() == {50, 100}
    assert two[100] == pytest.approx(one[100], abs=2e-6)


def test_resume_is_bit_exact_with_two_ranks_and_close_with_one(
    runs: dict[int, tuple[Path, str]], text_file: Path, cache_dir: Path, tmp_path: Path
) -> None:
    data = ("--data.source", str(text_file), "--data.cache-dir", str(cache_dir), "--lr.decay-steps", "95")
    expected = read_metric(runs[2][0], "train/loss")
    for steps, processes in ((10, 2), (20, 2), (30, 1)):
        process = start_torchrun("--run-dir", str(tmp_path), "--max-steps", str(steps), *data, processes=processes)
        output, _ = process.communicate(timeout=120)
        assert process.returncode == 0, output
    actual = read_metric(tmp_path, "train/loss")
    assert [actual[step] for step in range(1, 21)] == [expected[step] for step in range(1, 21)]
    assert max(abs(actual[step] - expected[step]) for step in range(21, 31)) < 1e-5


def test_two_ranks_train_on_a_packed_mixture_like_one(cache_dir: Path, tmp_path: Path) -> None:
    """Use sequences with different padding, so that the ranks have unequal numbers of targets."""
    for seed, name in enumerate(("books", "code")):
        (tmp_path / name).mkdir()
        for index in range(30):
            (tmp_path / name / f"{index}.txt").write_text(make_text(20, 30 * seed + index)[: 30 + 9 * (index % 3)])
    flags = [
        *("--data.source", str(tmp_path / "books"), str(tmp_path / "code"), "--data.weights", "2", "1"),
        *("--data.packing", "best-fit", "--data.document-mask", "--data.cache-dir", str(cache_dir)),
        *("--model.block-size", "64", "--tokens-per-step", "512", "--max-steps", "6", "--eval.interval", "3"),
        *("--data.val-fraction", "0.2", "--data.workers", "1", "--model.dropout", "0", "--sample.prompts"),
    ]
    memory_flags = ("--micro-batch-size", "auto", "--parallel.activation-checkpointing", "selective")
    process = start_torchrun(*flags, *memory_flags, "--run-dir", str(tmp_path / "two"))
    config = parse_train([*FLAGS[1:], *flags, "--run-dir", str(tmp_path / "one")]).as_train_config()
    build_trainer(open_run(config)).train()
    output, _ = process.communicate(timeout=120)
    assert process.returncode == 0, output
    for key, steps in (("train/loss", range(1, 7)), ("val/loss", (3, 6)), ("val/loss/code", (3, 6))):
        one, two = (read_metric(tmp_path / run, key) for run in ("one", "two"))
        assert list(one) == list(two) == list(steps)
        assert [two[step] for step in steps] == pytest.approx([one[step] for step in steps], abs=1e-5)
    assert read_metric(tmp_path / "two", "train/loss")[1] == pytest.approx(
        read_metric(tmp_path / "one", "train/loss")[1], abs=1e-6
    )


def test_only_rank_0_prints(runs: dict[int, tuple[Path, str]]) -> None:
    output = runs[2][1]
    assert output.count("finished at step 100") == 1
    assert "2 processes" in output


def assert_one_line(output: str, line: str) -> None:
    """Assert that one rank prints one line, and no other prints anything about its lost connection."""
    assert output.count("gpt: error: ") == 1, output
    assert line in output
    ranks_output = output.partition("torch/distributed/elastic")[0]  # then comes the launcher's own report
    assert "Traceback" not in ranks_output, output
    assert "Connection closed" not in output


def test_user_error_is_printed_once(tmp_path: Path) -> None:
    for attempt in range(3):  # it depends on which rank is first
        process = start_torchrun("--run-dir", str(tmp_path), "--data.source", f"/no/such/text{attempt}")
        output, _ = process.communicate(timeout=120)
        assert process.returncode != 0
        assert_one_line(output, f"gpt: error: --data.source /no/such/text{attempt}: no such file or folder")


FAILING_SCRIPT = """
import os, sys
from gpt import run
from gpt.data import corpus
from gpt.errors import UserError
from gpt.main import program
from gpt.training.train_step import TrainStep
from gpt.utils import launch

place, rank, sys.argv = sys.argv[1], sys.argv[2], ["gpt", *sys.argv[3:]]

def fail(*_, **__):
    if os.environ["RANK"] == rank:
        if place == "system error":
            raise PermissionError(13, "Permission denied", "a shard")
        raise UserError("a shard is damaged")
    return work(*_, **__)

if place == "step":
    work, TrainStep.__call__ = TrainStep.__call__, fail
elif place == "corpus":
    work, corpus.open_corpus = corpus.open_corpus, fail
else:
    work, corpus.prepare_corpus, launch.local_rank = corpus.prepare_corpus, fail, lambda: 0
program()
"""


@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize("place", ["step", "corpus", "preparation", "system error"])
def test_mistake_on_one_rank_is_one_line_from_one_rank(
    place: str, rank: int, text_file: Path, cache_dir: Path, tmp_path: Path
) -> None:
    (tmp_path / "script.py").write_text(FAILING_SCRIPT)
    flags = [*FLAGS, "--run-dir", str(tmp_path / "run"), "--data.source", str(text_file), "--max-steps", "3"]
    process = start_torchrun(
        place, str(rank), *flags, "--data.cache-dir", str(cache_dir), script=tmp_path / "script.py"
    )
    output, _ = process.communicate(timeout=120)
    assert process.returncode != 0
    reason = "a shard: Permission denied" if place == "system error" else "a shard is damaged"
    by_rank_0 = rank == 1 and place != "step"
    assert_one_line(output, f"gpt: error: rank 1: {reason}" if by_rank_0 else f"gpt: error: {reason}")


def test_signal_to_one_rank_stops_both_with_a_checkpoint(text_file: Path, cache_dir: Path, tmp_path: Path) -> None:
    process = start_torchrun(
        *("--run-dir", str(tmp_path), "--max-steps", "100000", "--checkpoint.interval", "0", "--eval.interval", "0"),
        *("--data.source", str(text_file), "--data.cache-dir", str(cache_dir)),
    )
    try:
        children = Path(f"/proc/{process.pid}/task/{process.pid}/children")
        deadline = time.monotonic() + 60
        while not (tmp_path / "metrics.jsonl").exists() and time.monotonic() < deadline:
            time.sleep(0.1)
        os.kill(int(children.read_text().split()[-1]), signal.SIGTERM)
        output, _ = process.communicate(timeout=60)
    finally:
        process.kill()
    saved = [path.name for path in (tmp_path / "checkpoints").iterdir()]
    assert len(saved) == 1, output
    assert saved[0].startswith("step_"), output
    assert "SIGTERM at step" in output


DIGEST_SCRIPT = """
import hashlib, os, sys
from pathlib import Path
from gpt.configs.train_config import TrainConfig
from gpt.run import open_run
from gpt.pipeline import build_trainer
from gpt.utils.launch import end_process

run = open_run(TrainConfig.model_validate_json(Path(sys.argv[1]).read_text()))
trainer = build_trainer(run)
trainer.train()
digest = hashlib.sha256()
for tensor in trainer._state.model.state_dict().values():
    digest.update(tensor.numpy().tobytes())
Path(f"{sys.argv[1]}.{os.environ['RANK']}").write_text(digest.hexdigest())
run.dist.close()
end_process()
"""


def test_muon_update_is_bit_exact_on_every_rank(tiny: Callable[..., TrainConfig], tmp_path: Path) -> None:
    (tmp_path / "script.py").write_text(DIGEST_SCRIPT)
    config = tiny(tmp_path / "run", optimizer={"name": "muon"}, micro_batch_size=2, dtype="bfloat16")
    (tmp_path / "config.json").write_text(config.model_dump_json())
    process = start_torchrun(str(tmp_path / "config.json"), script=tmp_path / "script.py")
    output, _ = process.communicate(timeout=120)
    assert process.returncode == 0, output
    first, second = (Path(f"{tmp_path}/config.json.{rank}").read_text() for rank in (0, 1))
    assert first == second
    build_trainer(open_run(config.model_copy(update={"run_dir": tmp_path / "alone"}))).train()
    for key in ("train/loss", "grad_norm"):
        two, one = (read_metric(tmp_path / name, key)[1] for name in ("run", "alone"))
        assert two == pytest.approx(one, abs=1e-6)


def test_blocks_are_compiled_under_ddp_without_graph_breaks() -> None:
    process = start_torchrun(script=Path(__file__).with_name("compiled_steps.py"))
    output, _ = process.communicate(timeout=240)
    assert process.returncode == 0, output
    facts = json.loads(next(line for line in output.splitlines() if line.startswith("{")))
    for mode in ("none", "block", "selective"):
        expected = {"is_compiled": True, "is_ddp": True, "graphs": 4, "graph_breaks": 0}
        assert {key: facts[mode][key] for key in expected} == expected
        assert facts[mode]["grad_norm"] == pytest.approx(facts["none"]["grad_norm"], rel=1e-5)
