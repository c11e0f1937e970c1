"""`--parallel.reproducible`: every bit the same at 1, 2 and 4 processes, and through resumes from one to another."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from gpt.configs.train_config import TrainConfig
from gpt.pipeline import build_trainer
from gpt.run import open_run
from tests.distributed.test_torchrun import torchrun

Configure = Callable[..., TrainConfig]

SCRIPT = """
import sys
from pathlib import Path
from gpt.configs.train_config import TrainConfig
from gpt.run import open_run
from gpt.pipeline import build_trainer
from gpt.utils.launch import end_process

for path in sys.argv[1:]:
    with open_run(TrainConfig.model_validate_json(Path(path).read_text())) as layout:
        build_trainer(layout).train()
    layout.dist.close()
end_process()
"""
MODERN = {"position": "rotary", "norm": "rmsnorm", "mlp": "swiglu", "qk_norm": True, "dropout": 0.1}
CASES: dict[str, dict[str, Any]] = {
    "adamw-float32": {"grad_clip": 0.3},
    "adamw-bfloat16": {"dtype": "bfloat16", "parallel": {"activation_checkpointing": "selective"}},
    "muon-float32": {"optimizer": {"name": "muon"}, "data": {"packing": "best-fit", "document_mask": True}},
    "muon-bfloat16": {"dtype": "bfloat16", "optimizer": {"name": "muon"}, "model": MODERN, "grad_clip": 0.3},
}
RESUMES = {1: 5, 2: 10, 4: 15}
"""Processes -> the step to which they bring the run that is resumed; one process then ends it."""
STEPS = 20


def record(run_dir: Path) -> dict[str, Any]:
    """All that is to be the same, of a whole run: losses, norms, evaluations, weights, optimizer."""
    lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    timed = {"tokens_per_second", "mfu", "peak_memory_bytes"}
    last = run_dir / "checkpoints" / f"step_{STEPS:08d}"
    return {
        "metrics": [{name: value for name, value in line.items() if name not in timed} for line in lines],
        "samples": (run_dir / "samples.jsonl").read_text(),
        "model": (last / "model.safetensors").read_bytes(),
        "optimizer": (last / "optimizer.safetensors").read_bytes(),
    }


@pytest.fixture(scope="module")
def runs(tiny: Configure, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("reproducible")
    (folder / "script.py").write_text(SCRIPT)

    def configure(case: str, name: str, steps: int) -> TrainConfig:
        changes = CASES[case] | {"max_steps": steps, "tokens_per_step": 256}
        changes["parallel"] = {"reproducible": True} | changes.get("parallel", {})
        changes["model"] = {"dropout": 0.1} | changes.get("model", {})
        return tiny(folder / case / name, **changes)

    def train_alone(*configs: TrainConfig) -> None:
        for config in configs:
            with open_run(config) as layout:
                build_trainer(layout).train()

    def train_together(processes: int, *configs: TrainConfig) -> None:
        files = []
        for config in configs:
            files.append(folder / f"{len(list(folder.iterdir()))}.json")
            files[-1].write_text(config.model_dump_json())
        process = torchrun(*map(str, files), processes=processes, script=folder / "script.py")
        output, _ = process.communicate(timeout=200)
        assert process.returncode == 0, output

    for processes, steps in RESUMES.items():
        whole = [configure(case, str(processes), STEPS) for case in CASES]
        part = [configure(case, "resumed", steps) for case in CASES]
        if processes == 1:
            train_alone(*whole, *part)
        else:
            train_together(processes, *whole, *part)
    train_alone(*(configure(case, "resumed", STEPS) for case in CASES))
    return folder


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("name", ["2", "4", "resumed"])
def test_every_bit_is_the_same_at_every_number_of_processes(runs: Path, case: str, name: str) -> None:
    expected, found = record(runs / case / "1"), record(runs / case / name)
    for what in ("metrics", "samples"):
        if name != "resumed":  # whose parts each end with an evaluation
            assert found[what] == expected[what]
    losses = [[r["train/loss"], r["grad_norm"]] for r in found["metrics"] if "train/loss" in r]
    assert losses == [[r["train/loss"], r["grad_norm"]] for r in expected["metrics"] if "train/loss" in r]
    assert len(losses) == STEPS
    assert found["model"] == expected["model"]
    assert found["optimizer"] == expected["optimizer"]


def test_one_thread_computes_unless_told_otherwise(tiny: Configure, tmp_path: Path) -> None:
    torch.set_num_threads(2)
    try:
        layout = open_run(tiny(tmp_path, parallel={"reproducible": True}))
        assert torch.get_num_threads() == 1
        assert layout.plan.identity["--runtime.threads"] == 1
        assert (
            open_run(tiny(tmp_path, parallel={"reproducible": True}, runtime={"threads": 2})).plan.identity[
                "--runtime.threads"
            ]
            == 2
        )
    finally:
        torch.set_num_threads(1)
