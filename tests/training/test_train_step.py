import math
from collections.abc import Mapping
from contextlib import closing, nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from gpt.checkpoint.app_state import AppState
from gpt.configs.batch_plan import BatchPlan
from gpt.configs.gpt_config import GPTConfig
from gpt.configs.optimizer_config import OptimizerConfig
from gpt.data.data_loader import DataLoader, MicroBatch, StepBatch
from gpt.data.packing import pack
from gpt.data.sequences import PackedDocuments
from gpt.models.gpt import GPT
from gpt.optim.build import build_optimizer, set_learning_rate
from gpt.parallel.gradient_sync import AveragedGradients
from gpt.training.observer import Probe
from gpt.training.step_timer import StepTimer
from gpt.training.train_step import TrainStep, clip_gradients, scale_or_nan
from gpt.utils.helper import IGNORED
from tests.conftest import write_stream
from tests.training.example_events import PLAN

CONFIG = GPTConfig(n_layer=2, n_head=2, n_embd=16, block_size=8, vocab_size=13)
WINDOWS = torch.randint(13, (8, 9), generator=torch.Generator().manual_seed(0))


def cut(size: int) -> StepBatch:
    pieces = [MicroBatch(i, c[:, :-1].contiguous(), c[:, 1:].contiguous()) for i, c in enumerate(WINDOWS.split(size))]
    return StepBatch(tuple(pieces), 64)


class RepeatedBatch:
    """A loader that gives every step the same batch."""

    def __init__(self, batch: StepBatch):
        self.batch = batch

    def get_batch(self, step: int) -> StepBatch:
        return self.batch


def make(model: GPT, batch: StepBatch | DataLoader | None = None, grad_clip: float = 1.0, **changes: Any) -> TrainStep:
    state = AppState(
        model,
        changes.pop("optimizer", None) or build_optimizer(model, OptimizerConfig(), max_lr=1e-2),
        changes.pop("scaler", None) or torch.amp.GradScaler("cpu", enabled=False),
        torch.zeros((), dtype=torch.int64),
        identity={},
    )
    settings: dict[str, Any] = {
        "loader": batch if isinstance(batch, DataLoader) else RepeatedBatch(batch or cut(8)),
        "schedule": lambda step: 1.0,
        "autocast": nullcontext,
        "gradients": AveragedGradients(model, world_size=1),
        "timer": StepTimer(torch.device("cpu")),
    } | changes
    return TrainStep(model, state, replace(PLAN, seed=1), grad_clip=grad_clip, **settings)


def test_step_equals_plain_torch_loop() -> None:
    ours, theirs = GPT(CONFIG, seed=0), GPT(CONFIG, seed=0)
    stats = make(ours, cut(8), grad_clip=0.5)(0)
    optimizer = build_optimizer(theirs, OptimizerConfig(), max_lr=1e-2)
    loss = F.cross_entropy(theirs(WINDOWS[:, :-1]).flatten(0, 1), WINDOWS[:, 1:].flatten())
    loss.backward()
    norm = torch.nn.utils.clip_grad_norm_(theirs.parameters(), 0.5)
    optimizer.step()
    torch.testing.assert_close(stats.loss_sum / 64, loss.detach())
    torch.testing.assert_close(stats.grad_norm, norm)
    for mine, other in zip(ours.parameters(), theirs.parameters(), strict=True):
        # The biases of keys have no gradient but rounding, which AdamW divides by its own size.
        torch.testing.assert_close(mine, other, atol=5e-6, rtol=0)


@pytest.mark.parametrize("size", [1, 2, 4])
def test_accumulation_changes_only_rounding(size: int) -> None:
    step_once, step_accumulated = make(GPT(CONFIG, seed=0), cut(8)), make(GPT(CONFIG, seed=0), cut(size))
    for step in range(3):
        one, many = step_once(step), step_accumulated(step)
        torch.testing.assert_close(one.loss_sum / 64, many.loss_sum / 64, atol=1e-6, rtol=0)
        torch.testing.assert_close(one.grad_norm, many.grad_norm, atol=1e-6, rtol=1e-5)


def test_clipping_bounds_gradient_norm_and_zero_does_not_clip() -> None:
    for grad_clip, bound in ((1e-3, 1e-3), (0.0, None)):
        model = GPT(CONFIG, seed=0)
        norms: list[float] = []
        step = make(model, grad_clip=grad_clip)
        step._optimizer.register_step_pre_hook(
            lambda *_, m=model, n=norms: n.append(
                float(torch.nn.utils.get_total_norm([p.grad for p in m.parameters()]))
            )
        )
        norm = step(0).grad_norm.item()
        assert norms[0] == pytest.approx(bound or norm, rel=1e-3)


def test_dropout_depends_on_step_and_micro_batch_alone() -> None:
    losses = []
    for disturb in (False, True):
        step = make(GPT(CONFIG.model_copy(update={"dropout": 0.3}), seed=0), cut(4))
        if disturb:
            torch.rand(100)
        losses.append([step(at).loss_sum.item() for at in (0, 1)])
    assert losses[0] == losses[1]
    model = GPT(CONFIG.model_copy(update={"dropout": 0.3}), seed=0)
    batch = cut(4).micro_batches[0]
    draws = [
        float(make(model)._accumulate(at, MicroBatch(i, batch.inputs, batch.targets), 1 / 64, is_last=True))
        for at, i in ((0, 0), (1, 0), (0, 1), (0, 0))
    ]
    assert len(set(draws)) == 3
    assert draws[0] == draws[3]


def test_float16_overflow_skips_update_and_is_counted() -> None:
    model = GPT(CONFIG, seed=0)
    before = [p.clone() for p in model.parameters()]
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**120, growth_interval=1000)
    step = make(model, scaler=scaler, autocast=partial(torch.autocast, "cpu", torch.float16))
    step(0)
    assert int(step._skipped_updates) == 1
    assert scaler.get_scale() == 2.0**119
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))
    scaler.load_state_dict(scaler.state_dict() | {"scale": 2.0**8})
    stats = step(1)
    assert int(step._skipped_updates) == 1
    assert stats.grad_norm.isfinite()
    assert not torch.equal(before[0], next(model.parameters()))


def bits(step: TrainStep, model: GPT) -> list[bytes]:
    """Return the bytes of the parameters and the optimizer's state."""
    tensors = [t for p in model.parameters() for t in (p, *step._optimizer.state[p].values())]
    return [tensor.detach().numpy().tobytes() for tensor in tensors]


@pytest.mark.parametrize("name", ["adamw", "muon"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("fault", ["nan loss", "inf loss", "nan gradient", "inf gradient", "huge gradient"])
def test_non_finite_loss_or_gradient_skips_update_bit_exactly(name: str, dtype: torch.dtype, fault: str) -> None:
    model = GPT(CONFIG, seed=0)
    optimizer = build_optimizer(model, OptimizerConfig(name=name), max_lr=1e-2, hidden=model.hidden_matrices())
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**8, enabled=dtype == torch.float16)
    autocast = partial(torch.autocast, "cpu", dtype, enabled=dtype != torch.float32)
    batch = cut(4)
    second = batch.micro_batches[1]
    step = make(model, batch, optimizer=optimizer, scaler=scaler, autocast=autocast)
    step(0)
    before, value = bits(step, model), {"nan": math.nan, "inf": math.inf, "huge": 1e38}[fault.split()[0]]
    if "loss" in fault:  # of one micro-batch alone; an inf that is added has a finite gradient
        handle = model.register_forward_hook(lambda _, args, loss: loss + value if args[1] is second.targets else loss)
    else:
        # A huge one is finite, and its norm is not.
        handle = model.wpe.weight.register_hook(lambda gradient: torch.ones_like(gradient) * value)
    stats = step(1)
    handle.remove()
    assert not stats.grad_norm.isfinite()
    assert bits(step, model) == before
    assert int(step._skipped_updates) == 1
    assert step(2).grad_norm.isfinite()
    assert all(parameter.isfinite().all() for parameter in model.parameters())
    assert bits(step, model) != before
    assert int(step._skipped_updates) == 1


@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_optimizer_skips_bit_exactly_by_found_inf(name: str) -> None:
    """Take CUDA's path, where the host does not read is_finite, with tensors on the CPU."""
    finals = []
    for gradients in ([1.0, math.nan, 2.0], [1.0, 2.0]):
        model = GPT(CONFIG, seed=0)
        optimizer = build_optimizer(model, OptimizerConfig(name=name), max_lr=1e-2, hidden=model.hidden_matrices())
        set_learning_rate(optimizer, 1.0)
        for gradient in gradients:
            for parameter in model.parameters():
                parameter.grad = torch.full_like(parameter, gradient)
            optimizer.found_inf = torch.tensor(float(math.isnan(gradient)))  # type: ignore[attr-defined]
            optimizer.step()
        finals.append(
            [t.detach().numpy().tobytes() for p in model.parameters() for t in (p, *optimizer.state[p].values())]
        )
    assert finals[0] == finals[1]


def test_scale_of_a_finite_loss_is_bit_exact() -> None:
    losses = 1e3 * torch.rand(1000, generator=torch.Generator().manual_seed(0))
    for scale in (1 / 64, 1 / 2999, 2 / 12345):
        assert torch.equal(losses * scale, torch.stack([loss * scale_or_nan(scale, loss) for loss in losses]))


@pytest.fixture
def padded(tmp_path: Path) -> PackedDocuments:
    """Pack documents in rows with different padding."""
    generator = np.random.default_rng(0)
    documents = [(generator.integers(1, 13, n), 1) for n in (5, 6, 7, 8, 1, 20, 5, 3, 5, 7, 6, 5, 1, 1)]
    stream = write_stream(tmp_path, documents)
    packing = pack(stream, 8, ends_are_targets=False)
    return PackedDocuments(stream, packing, 8, seed=1, end_of_text=None, document_mask=False)


@pytest.mark.parametrize(("size", "ranks"), [(8, 1), (2, 1), (1, 1), (2, 2), (1, 4)])
def test_loss_is_mean_over_targets_at_every_micro_batch_size_and_world_size(
    padded: PackedDocuments, size: int, ranks: int
) -> None:
    """Run the ranks one after the other, and average their gradients as DDP would."""
    rows = padded.read(0, 8)
    inputs, targets = torch.from_numpy(rows.inputs), torch.from_numpy(rows.targets)
    counts = (targets != IGNORED).sum(dim=1)
    assert len(set(counts.tolist())) > 2
    theirs = GPT(CONFIG, seed=0)
    loss = F.cross_entropy(theirs(inputs).flatten(0, 1), targets.flatten(), ignore_index=IGNORED)  # torch's own mean
    loss.backward()

    plan = BatchPlan(micro_batch_size=size, block_size=8, world_size=ranks, grad_accum_steps=8 // size // ranks)
    loss_sum = 0.0
    gradients = [torch.zeros_like(parameter) for parameter in theirs.parameters()]
    for rank in range(ranks):
        model = GPT(CONFIG, seed=0)
        loader = DataLoader(padded, plan, rank=rank, device=torch.device("cpu"))
        step = make(model, loader, grad_clip=0, gradients=AveragedGradients(model, world_size=ranks))
        rank_gradients: list[torch.Tensor] = []
        step._optimizer.register_step_pre_hook(
            lambda *_, m=model, g=rank_gradients: g.extend(p.grad for p in m.parameters())
        )
        with closing(step):
            stats = step(0)
        assert stats.n_targets == int(counts.sum())
        loss_sum += float(stats.loss_sum)
        gradients = [total + part / ranks for total, part in zip(gradients, rank_gradients, strict=True)]
    assert loss_sum / int(counts.sum()) == pytest.approx(loss.item(), abs=1e-6)
    for ours, parameter in zip(gradients, theirs.parameters(), strict=True):
        torch.testing.assert_close(ours, parameter.grad, atol=1e-6, rtol=1e-5)


def test_document_mask_reaches_the_model(padded: PackedDocuments) -> None:
    rows = padded.read(0, 2)
    documents = torch.arange(8).div(3, rounding_mode="floor").repeat(2, 1)
    tensors = (torch.from_numpy(rows.inputs), torch.from_numpy(rows.targets))
    n_targets = int((rows.targets != IGNORED).sum())
    losses = []
    for batch in (MicroBatch(0, *tensors), MicroBatch(0, *tensors, documents)):
        losses.append(float(make(GPT(CONFIG, seed=0), StepBatch((batch,), n_targets))(0).loss_sum))
    assert losses[1] == pytest.approx(GPT(CONFIG, seed=0)(*tensors, documents).item(), rel=1e-6)
    assert losses[0] != losses[1]


def test_step_without_targets_leaves_finite_weights() -> None:
    model = GPT(CONFIG, seed=0)
    batch = MicroBatch(0, torch.zeros((2, 8), dtype=torch.int64), torch.full((2, 8), IGNORED))
    stats = make(model, StepBatch((batch,), 0))(0)
    assert (float(stats.loss_sum), float(stats.grad_norm)) == (0, 0)
    assert all(parameter.isfinite().all() for parameter in model.parameters())


@pytest.mark.parametrize("max_norm", [0.5, 1.0, 5.0, 5.0 + 5e-7, 6.0, math.inf])
def test_clipping_equals_torch_bit_exactly(max_norm: float) -> None:
    """Check a norm of 5 above, below and within rounding of the bound."""
    ours, theirs = ([torch.nn.Parameter(torch.zeros(2)), torch.nn.Parameter(torch.zeros(1))] for _ in range(2))
    for parameters in (ours, theirs):
        parameters[0].grad = torch.tensor([3.0, 4.0])
    norms = clip_gradients(ours, max_norm), torch.nn.utils.clip_grad_norm_(theirs, max_norm)
    assert torch.equal(*norms)
    assert torch.equal(ours[0].grad, theirs[0].grad)
    assert ours[1].grad is None


def test_step_sets_the_scheduled_learning_rate() -> None:
    step = make(GPT(CONFIG, seed=0), schedule=lambda step: 1 / (step + 2))
    for at in (0, 3):
        assert step(at).lr == PLAN.lr.max_lr / (at + 2)
        assert [group["lr"] for group in step._optimizer.param_groups] == [1e-2 / (at + 2)] * 2


def test_probes_see_the_unscaled_gradient_before_clipping() -> None:
    class GradSum(Probe):
        def measure(self, parameters: Mapping[str, torch.nn.Parameter]) -> dict[str, torch.Tensor]:
            assert not torch.is_grad_enabled()
            return {"wte": parameters["wte.weight"].grad.sum(), "before": parameters["wte.weight"].sum()}

    model = GPT(CONFIG, seed=0)
    before = model.wte.weight.detach().sum()
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**8)
    stats = make(model, grad_clip=1e-6, scaler=scaler)(0, [GradSum()])
    reference = GPT(CONFIG, seed=0)
    F.cross_entropy(reference(WINDOWS[:, :-1]).flatten(0, 1), WINDOWS[:, 1:].flatten()).backward()
    torch.testing.assert_close(stats.probes["wte"], reference.wte.weight.grad.sum(), atol=1e-6, rtol=1e-4)
    assert torch.equal(stats.probes["before"], before)
    assert make(GPT(CONFIG, seed=0))(0).probes == {}
