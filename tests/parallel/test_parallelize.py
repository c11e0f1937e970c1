import logging
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
import torch._dynamo
from torch import nn

from gpt.auto_batch import trial_loss
from gpt.configs.gpt_config import GPTConfig
from gpt.configs.parallel_config import ParallelConfig
from gpt.models.gpt import GPT
from gpt.parallel.gradient_sync import AveragedGradients
from gpt.parallel.parallelize import compile_or_fall_back, parallelize
from gpt.utils.distributed import DistContext

SIZES = {"n_layer": 2, "n_head": 2, "n_embd": 64, "block_size": 32, "vocab_size": 128}
QWEN3 = {"position": "rotary", "norm": "rmsnorm", "mlp": "swiglu", "bias": False, "n_kv_head": 1, "qk_norm": True}
N_GRAPHS = 4
"""A block's and the loss's, in training and in evaluation."""


@pytest.fixture
def cheap_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    """Trace and partition as the default backend does, without generating code."""
    compile_module = nn.Module.compile

    def compile_cheaply(module: nn.Module, *, mode: str | None, fullgraph: bool) -> None:
        compile_module(module, backend="aot_eager", fullgraph=fullgraph)

    monkeypatch.setattr(nn.Module, "compile", compile_cheaply)
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()


def run_trial(model: GPT, *, mode: str = "none", masked: bool = False, bfloat16: bool = False) -> bool:
    config = ParallelConfig.model_validate({"activation_checkpointing": mode})
    dist = DistContext("cpu")
    module = parallelize(model, model.h, dist, config, compile_mode="default", others=[model.loss])
    assert module is model
    trial = partial(
        trial_loss,
        n_sequences=2,
        block_size=32,
        masked=masked,
        device=torch.device("cpu"),
        autocast=partial(torch.autocast, "cpu", torch.bfloat16, enabled=bfloat16),
    )
    return compile_or_fall_back(model, module, trial, dist) == ""


def count_graphs() -> int:
    counters = torch._dynamo.utils.counters
    assert not counters["graph_break"]
    return counters["stats"]["unique_graphs"]


def draw_batch(masked: bool) -> list[tuple[torch.Tensor, ...]]:
    """Return two micro-batches, views of one batch as the loader cuts them."""
    tokens = torch.randint(128, (4, 33))
    tensors = [tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()]
    if masked:
        tensors.append((torch.arange(32) // 10).expand(4, 32).contiguous())
    return list(zip(*(tensor.split(2) for tensor in tensors), strict=True))


@pytest.mark.parametrize("mode", ["none", "block", "selective"])
@pytest.mark.parametrize(
    ("changes", "masked", "bfloat16"),
    [({}, False, False), ({"dropout": 0.1}, True, False), (QWEN3, True, True)],
    ids=["gpt2", "dropout", "qwen3"],
)
def test_nothing_compiles_after_the_trial(
    changes: dict[str, object], masked: bool, bfloat16: bool, mode: str, cheap_compiler: None
) -> None:
    model = GPT(GPTConfig.model_validate(SIZES | changes), seed=0)
    assert run_trial(model, mode=mode, masked=masked, bfloat16=bfloat16)
    assert count_graphs() == N_GRAPHS
    with torch.compiler.set_stance("fail_on_recompile"), torch.autocast("cpu", torch.bfloat16, enabled=bfloat16):
        for trains in (True, False, True):
            model.train(trains)
            for micro_batch in draw_batch(masked):
                with torch.set_grad_enabled(trains):
                    loss = model(*micro_batch)
                if trains:
                    loss.backward()
    assert count_graphs() == N_GRAPHS


def test_more_layers_compile_no_more_graphs(cheap_compiler: None) -> None:
    graphs = []
    for n_layer in (2, 12):
        torch._dynamo.reset()
        torch._dynamo.utils.counters.clear()
        assert run_trial(GPT(GPTConfig.model_validate(SIZES | {"n_layer": n_layer}), seed=0))
        graphs.append(count_graphs())
    assert graphs == [N_GRAPHS, N_GRAPHS]


@pytest.mark.parametrize("mode", ["none", "block", "selective"])
def test_compiled_model_equals_the_eager_one(mode: str, cheap_compiler: None) -> None:
    eager, compiled = (GPT(GPTConfig.model_validate(SIZES | QWEN3), seed=0) for _ in range(2))
    names = list(eager.state_dict())
    assert run_trial(compiled, mode=mode, masked=True)
    assert list(compiled.state_dict()) == names
    inputs = draw_batch(masked=True)[0]
    for model in (eager, compiled):
        model(*inputs).backward()
    for mine, other in zip(compiled.parameters(), eager.parameters(), strict=True):
        torch.testing.assert_close(mine.grad, other.grad, rtol=1e-4, atol=1e-5)


class OtherRankFails(DistContext):
    """Rank 0 of two ranks, of which the other one cannot compile."""

    def __init__(self) -> None:
        super().__init__("cpu")
        self.world_size = 2

    def min(self, value: int) -> int:
        return min(value, 1)

    def broadcast(self, value: Any, source: int = 0) -> Any:
        return value if source == 0 else "no Triton"


def make_linear(
    trial: Callable[[nn.Module], torch.Tensor], dist: DistContext | None = None
) -> tuple[nn.Linear, Callable[[], str]]:
    model, ranks = nn.Linear(2, 2), dist or DistContext("cpu")
    assert parallelize(model, [model], DistContext("cpu"), ParallelConfig(), compile_mode="default") is model
    assert model._compiled_call_impl is not None
    return model, lambda: compile_or_fall_back(model, model, trial, ranks)


def test_a_failing_compiler_falls_back_to_the_uncompiled_model(caplog: pytest.LogCaptureFixture) -> None:
    def trial(module: nn.Module) -> torch.Tensor:
        module.weight.grad = torch.ones(2, 2)
        raise RuntimeError("no C++ compiler\nand much more")

    model, compile_model = make_linear(trial)
    with caplog.at_level(logging.WARNING):
        assert compile_model() == "no C++ compiler"
    assert "torch.compile does not work here (no C++ compiler)" in caplog.text
    assert model._compiled_call_impl is None
    assert model.weight.grad is None
    assert model.training
    assert model(torch.ones(1, 2)).shape == (1, 2)


def test_no_rank_is_compiled_where_another_one_fails() -> None:
    model, compile_model = make_linear(lambda module: module.weight.sum(), OtherRankFails())
    assert compile_model() == "no Triton"
    assert model._compiled_call_impl is None


@pytest.mark.parametrize("is_wrapped", [False, True])
@pytest.mark.parametrize("kind", [torch.OutOfMemoryError, MemoryError])
def test_out_of_memory_in_the_trial_is_out_of_memory(
    kind: type[Exception], is_wrapped: bool, caplog: pytest.LogCaptureFixture
) -> None:
    def trial(module: nn.Module) -> torch.Tensor:
        try:
            raise kind("out of memory: tried to allocate 2 GiB")
        except kind as error:
            if is_wrapped:
                raise RuntimeError("the backend raised") from error
            raise

    _, compile_model = make_linear(trial)
    with pytest.raises(kind, match="tried to allocate 2 GiB"):
        compile_model()
    assert "torch.compile" not in caplog.text


def test_one_rank_needs_no_ddp() -> None:
    model = nn.Linear(2, 2)
    assert parallelize(model, (), DistContext("cpu"), ParallelConfig(), compile_mode=None) is model
    assert model._compiled_call_impl is None
    with AveragedGradients(model, world_size=1).micro_batch(is_last=False):
        model(torch.ones(1, 2)).sum().backward()
    assert model.weight.grad is not None


def test_activation_checkpointing_precedes_compile(monkeypatch: pytest.MonkeyPatch) -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    seen: list[tuple[bool, str | None, bool]] = []

    def compile_module(module: nn.Module, *, mode: str | None, fullgraph: bool) -> None:
        seen.append(("forward" in vars(module), mode, fullgraph))

    monkeypatch.setattr(nn.Module, "compile", compile_module)
    config = ParallelConfig(activation_checkpointing="block")
    parallelize(model, model[:1], DistContext("cpu"), config, compile_mode="max-autotune", others=[model[1]])
    assert seen == [(True, "max-autotune-no-cudagraphs", True), (False, "max-autotune-no-cudagraphs", True)]
    assert seen[0][1] in torch._inductor.list_mode_options()
