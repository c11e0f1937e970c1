import logging

import pytest
import torch
from torch import nn

from gpt.configs.parallel_config import ParallelConfig
from gpt.parallel.gradient_sync import AveragedGradients
from gpt.parallel.parallelize import compile_or_fall_back, parallelize
from gpt.utils.distributed import DistContext


def test_a_failing_compiler_falls_back_to_the_uncompiled_model(caplog: pytest.LogCaptureFixture) -> None:
    model = nn.Linear(2, 2)

    def trial(module: nn.Module) -> torch.Tensor:
        assert model._compiled_call_impl is not None
        model.weight.grad = torch.ones(2, 2)
        raise RuntimeError("no C++ compiler\nand much more")

    assert parallelize(model, (), DistContext("cpu"), ParallelConfig(), compile_mode="default") is model
    with caplog.at_level(logging.WARNING):
        compile_or_fall_back(model, model, trial)
    assert "torch.compile does not work here (no C++ compiler)" in caplog.text
    assert model._compiled_call_impl is None
    assert model.weight.grad is None
    assert model(torch.ones(1, 2)).shape == (1, 2)


def test_one_rank_needs_no_ddp() -> None:
    model = nn.Linear(2, 2)
    assert parallelize(model, (), DistContext("cpu"), ParallelConfig(), compile_mode=None) is model
    assert model._compiled_call_impl is None
    with AveragedGradients(model, world_size=1).micro_batch(is_last=False):
        model(torch.ones(1, 2)).sum().backward()
    assert model.weight.grad is not None


def test_activation_checkpointing_precedes_compile() -> None:
    model = nn.Sequential(nn.Linear(2, 2))
    plain = model[0].forward
    seen: list[tuple[bool, str | None]] = []

    def compile_model(mode: str | None) -> None:
        seen.append((model[0].forward != plain, mode))

    model.compile = compile_model  # type: ignore[method-assign]
    config = ParallelConfig(activation_checkpointing="block")
    parallelize(model, model, DistContext("cpu"), config, compile_mode="max-autotune")
    assert seen == [(True, "max-autotune-no-cudagraphs")]
    assert seen[0][1] in torch._inductor.list_mode_options()
