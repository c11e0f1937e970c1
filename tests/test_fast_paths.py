"""The plan and the lineage say which fast paths a GPU takes; the GPU is a CPU that says so."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from gpt import fast_paths, run
from gpt.configs.gpt_config import GPTConfig
from gpt.configs.train_config import TrainConfig
from gpt.fast_paths import try_fast_paths
from gpt.pipeline import build_trainer
from gpt.run import open_run
from gpt.training.events import TrainStart
from gpt.training.observer import Observer
from gpt.training.sinks.console.plan_screen import format_plan
from gpt.utils.distributed import DistContext
from tests.training.example_events import PLAN

ALL = {"triton_loss", "flex_attention", "pinned_staging"}


class Ranks(DistContext):
    """Rank 0 of two, with a GPU; the other rank has what `other` says."""

    def __init__(self, other: bool):
        super().__init__("cpu")
        self.device, self.other = torch.device("cuda", 0), other

    def min(self, value: int) -> int:
        return min(value, int(self.other))


@pytest.fixture
def works(monkeypatch: pytest.MonkeyPatch) -> dict[str, bool]:
    """Return which fast paths work; a test may change it."""
    works = dict.fromkeys(ALL, True)
    monkeypatch.setattr(fast_paths, "loss_kernel_works", lambda *arguments: works["triton_loss"])
    monkeypatch.setattr(fast_paths, "supports_flex", lambda *arguments, **options: works["flex_attention"])
    monkeypatch.setattr(fast_paths, "can_pin_memory", lambda: works["pinned_staging"])
    return works


def configure(**changes: Any) -> TrainConfig:
    return TrainConfig.model_validate({"data": {"document_mask": True}} | changes)


@pytest.mark.parametrize("missing", sorted(ALL))
def test_plan_says_which_way_each_path_went(missing: str, works: dict[str, bool]) -> None:
    works[missing] = False
    plan = try_fast_paths(configure(), PLAN, Ranks(other=True))
    assert plan.machine.runtime == PLAN.machine.runtime | works
    shown = format_plan(plan)["runtime"].split(", ")
    assert {f"{'' if works[name] else 'no-'}{name.replace('_', '-')}" for name in ALL} <= set(shown)


def test_path_that_one_rank_lacks_is_none_of_the_run(works: dict[str, bool]) -> None:
    plan = try_fast_paths(configure(), PLAN, Ranks(other=False))
    assert plan.machine.runtime == PLAN.machine.runtime | dict.fromkeys(ALL, False)


@pytest.mark.parametrize(
    ("changes", "model", "expected"),
    [
        ({"data": {}}, {}, ALL - {"flex_attention"}),
        ({"data": {}}, {"sliding_window": 16}, ALL),
        ({"data": {}}, {"sliding_window": 256}, ALL - {"flex_attention"}),  # the whole row
        ({"checkpoint": {"asynchronous": False}}, {}, ALL - {"pinned_staging"}),
    ],
)
def test_only_paths_that_the_run_needs_are_tried(
    changes: dict[str, Any], model: dict[str, Any], expected: set[str], works: dict[str, bool]
) -> None:
    plan = replace(PLAN, model=GPTConfig(vocab_size=300, block_size=256, **model).resolve())
    tried = try_fast_paths(configure(**changes), plan, Ranks(other=True)).machine.runtime
    assert tried.keys() - PLAN.machine.runtime.keys() == expected


def test_cpu_has_none_of_them() -> None:
    assert try_fast_paths(configure(), PLAN, DistContext("cpu")) is PLAN


class PlanRecorder(Observer):
    """Keeps the plan of the run's first event."""

    def on_event(self, event: Any) -> tuple[()]:
        if isinstance(event, TrainStart):
            self.plan = event.plan
        return ()


def test_lineage_and_events_hold_the_plan_that_came_true(
    tiny: Callable[..., TrainConfig], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def compile_module(module: nn.Module, **options: Any) -> None:
        def fail(*arguments: Any, **keywords: Any) -> None:
            raise RuntimeError("no C++ compiler")

        module._compiled_call_impl = fail  # type: ignore[assignment]

    def try_gpu(config: TrainConfig, plan: Any, dist: DistContext) -> Any:
        return replace(plan, machine=replace(plan.machine, runtime=plan.machine.runtime | {"triton_loss": False}))

    monkeypatch.setattr(nn.Module, "compile", compile_module)
    monkeypatch.setattr(run, "try_fast_paths", try_gpu)
    recorder, note = (
        PlanRecorder(),
        "the run is not compiled, because torch.compile does not work here: no C++ compiler",
    )
    with open_run(tiny(tmp_path, compile="on", max_steps=1)) as opened:
        assert opened.plan.compiles
        trainer = build_trainer(opened)
        trainer.attach(recorder)
        trainer.train()
    assert (recorder.plan.compiles, recorder.plan.notes[-1]) == (False, note)
    (launch,) = map(json.loads, (tmp_path / "lineage.jsonl").read_text().splitlines())
    assert (launch["compiled"], launch["runtime"]["triton_loss"], launch["notes"][-1]) == (False, False, note)
