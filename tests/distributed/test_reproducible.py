"""`--parallel.reproducible`: bit-exact with 1, 2 and 4 ranks, and across resumes with another number of ranks."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from gpt.configs.train_config import TrainConfig
from gpt.pipeline import build_trainer
from gpt.run import open_run
from gpt.verification.compare import MACHINE_METRICS
from tests.distributed.test_torchrun import start_torchrun

Configure = Callable[..., TrainConfig]

SCRIPT = """
import sys
from pathlib import Path
from gpt.configs.train_config import TrainConfig
from gpt.run import open_run
from gpt.pipeline import build_trainer
from gpt.utils.launch import end_process

for path in sys.argv[1:]:
    with open_run(TrainConfig.model_validate_json(Path(path).read_text())) as run:
        build_trainer(run).train()
    run.dist.close()
end_process()
"""
MODERN = {"position": "rotary", "norm": "rmsnorm", "mlp": "swiglu", "qk_norm": True, "dropout": 0.1}
CASES: dict[str, dict[str, Any]] = {
    "adamw-float32": {"grad_clip": 0.3},
    "adamw-bfloat16": {"dtype": "bfloat16", "parallel": {"activation_checkpointing": "selective"}},
    "muon-float32": {"optimizer": {"name": "muon"}, "data": {"packing": "best-fit", "document_mask": True}},
    "muon-bfloat16": {"dtype": "bfloat16", "optimizer": {"name": "muon"}, "model": MODERN, "grad_clip": 0.3},
}
LAST_STEP_BY_RANKS = {1: 5, 2: 10, 4: 15}
"""Number of ranks -> last step of their part of the resumed run; one rank trains the rest."""
STEPS = 20


def read_results(run_dir: Path) -> dict[str, Any]:
    """Return what must be bit-exact: metrics, samples, weights and optimizer state."""
    lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    last = run_dir / "checkpoints" / f"step_{STEPS:08d}"
    return {
        "metrics": [{name: value for name, value in line.items() if name not in MACHINE_METRICS} for line in lines],
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
            with open_run(config) as run:
                build_trainer(run).train()

    def train_together(processes: int, *configs: TrainConfig) -> None:
        files = []
        for config in configs:
            files.append(folder / f"{len(list(folder.iterdir()))}.json")
            files[-1].write_text(config.model_dump_json())
        process = start_torchrun(*map(str, files), processes=processes, script=folder / "script.py")
        output, _ = process.communicate(timeout=200)
        assert process.returncode == 0, output

    for processes, steps in LAST_STEP_BY_RANKS.items():
        uninterrupted = [configure(case, str(processes), STEPS) for case in CASES]
        resumed = [configure(case, "resumed", steps) for case in CASES]
        if processes == 1:
            train_alone(*uninterrupted, *resumed)
        else:
            train_together(processes, *uninterrupted, *resumed)
    train_alone(*(configure(case, "resumed", STEPS) for case in CASES))
    return folder


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("name", ["2", "4", "resumed"])
def test_run_is_bit_exact_with_every_number_of_ranks(runs: Path, case: str, name: str) -> None:
    expected, actual = read_results(runs / case / "1"), read_results(runs / case / name)
    for kind in ("metrics", "samples"):
        if name != "resumed":  # each part of it ends with an additional evaluation
            assert actual[kind] == expected[kind]
    losses = [[r["train/loss"], r["grad_norm"]] for r in actual["metrics"] if "train/loss" in r]
    assert losses == [[r["train/loss"], r["grad_norm"]] for r in expected["metrics"] if "train/loss" in r]
    assert len(losses) == STEPS
    assert actual["model"] == expected["model"]
    assert actual["optimizer"] == expected["optimizer"]


def test_reproducible_mode_uses_one_thread_by_default(tiny: Configure, tmp_path: Path) -> None:
    torch.set_num_threads(2)
    try:
        run = open_run(tiny(tmp_path, parallel={"reproducible": True}))
        assert torch.get_num_threads() == 1
        assert run.plan.identity["--runtime.threads"] == 1
        assert (
            open_run(tiny(tmp_path, parallel={"reproducible": True}, runtime={"threads": 2})).plan.identity[
                "--runtime.threads"
            ]
            == 2
        )
    finally:
        torch.set_num_threads(1)
