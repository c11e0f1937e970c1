"""--micro-batch-size auto."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from gpt import auto_batch
from gpt.configs.load import load_config
from gpt.configs.train_config import TrainConfig
from gpt.errors import UserError
from gpt.pipeline import build_trainer
from gpt.run import open_run

Configure = Callable[..., TrainConfig]
Record = Callable[..., tuple[list[float], dict[str, torch.Tensor]]]

AUTO = {"micro_batch_size": "auto", "tokens_per_step": 12 * 16}


@pytest.fixture
def room(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], None]:
    """Set the bytes of memory that the run may plan with."""
    return lambda size: monkeypatch.setattr(auto_batch, "find_memory_budget", lambda: size)


def resolve_size(config: TrainConfig) -> int:
    return open_run(config, dry_run=True).plan.batch.micro_batch_size


def test_less_memory_gives_smaller_micro_batches_of_the_same_step(
    tiny: Configure, tmp_path: Path, room: Callable[[int], None]
) -> None:
    sizes = []
    for size in range(2**17, 2**21, 2**17):
        room(size)
        try:
            batch = open_run(tiny(tmp_path, **AUTO), dry_run=True).plan.batch
        except UserError:
            continue
        assert batch.tokens_per_step == 12 * 16
        sizes.append(batch.micro_batch_size)
    assert sizes == sorted(sizes)
    assert len({*sizes} & {1, 2, 3, 4, 6, 12}) >= 3
    assert sizes[-1] == 12


def test_activation_checkpointing_fits_larger_micro_batches(
    tiny: Configure, tmp_path: Path, room: Callable[[int], None]
) -> None:
    settings = AUTO | {"tokens_per_step": 64 * 16}
    room(2**19)
    lean = resolve_size(tiny(tmp_path, parallel={"activation_checkpointing": "block"}, **settings))
    assert resolve_size(tiny(tmp_path, **settings)) < lean


def test_cpu_micro_batch_is_bounded_and_the_plan_says_so(
    tiny: Configure, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(auto_batch, "MAX_CPU_TOKENS", 5 * 16)
    plan = open_run(tiny(tmp_path, **AUTO), dry_run=True).plan
    assert plan.batch.micro_batch_size == 4
    assert plan.notes == (
        "--micro-batch-size auto is 4, which divides the step: at most 5 sequences make a CPU faster or fit in memory",
    )


def test_too_little_memory_for_one_sequence_is_one_line(
    tiny: Configure, tmp_path: Path, room: Callable[[int], None]
) -> None:
    room(2**15)
    with pytest.raises(UserError, match=r"--micro-batch-size auto: not even one sequence of 16 tokens fits in memory"):
        open_run(tiny(tmp_path, **AUTO), dry_run=True)


def test_auto_size_changes_no_bit_and_resume_keeps_tokens_per_step(
    tiny: Configure, record: Record, tmp_path: Path
) -> None:
    settings = {"max_steps": 4, "model": {"dropout": 0.2}, "tokens_per_step": 12 * 16}
    fixed = record(tiny(tmp_path / "fixed", micro_batch_size=12, **settings))[0]
    auto = tiny(tmp_path / "auto", **settings | {"micro_batch_size": "auto"})
    assert record(auto)[0] == fixed
    assert json.loads((tmp_path / "auto/config.json").read_text())["micro_batch_size"] == "auto"
    assert load_config(tmp_path / "auto/config.json") == auto
    other = settings | {
        "micro_batch_size": 6,
        "max_steps": 5,
        "resume_with_changes": True,
    }  # dropout depends on the micro-batch
    longer = open_run(tiny(tmp_path / "auto", **other))
    assert longer.plan.batch.tokens_per_step == 12 * 16
    build_trainer(longer).train()
