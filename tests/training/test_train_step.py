from contextlib import nullcontext
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from gpt.configs.gpt_config import GPTConfig
from gpt.configs.optimizer_config import OptimizerConfig
from gpt.data.data_loader import MicroBatch
from gpt.models.gpt import GPT
from gpt.optim.build import build_optimizer
from gpt.training.train_step import TrainStep

CONFIG = GPTConfig(n_layer=2, n_head=2, n_embd=16, block_size=8, vocab_size=13)
WINDOWS = torch.randint(13, (8, 9), generator=torch.Generator().manual_seed(0))


def cut(size: int) -> list[MicroBatch]:
    return [MicroBatch(i, c[:, :-1].contiguous(), c[:, 1:].contiguous()) for i, c in enumerate(WINDOWS.split(size))]


def make(model: GPT, grad_clip: float = 1.0, **changes: Any) -> TrainStep:
    optimizer = build_optimizer(model, OptimizerConfig(), max_lr=1e-2)
    settings: dict[str, Any] = {
        "scaler": torch.amp.GradScaler("cpu", enabled=False),
        "skipped_updates": torch.zeros((), dtype=torch.int64),
        "autocast": nullcontext,
    } | changes
    return TrainStep(model, optimizer, loss_scale=1 / 64, grad_clip=grad_clip, seed=1, **settings)


def test_a_step_is_the_plain_torch_loop() -> None:
    ours, theirs = GPT(CONFIG, seed=0), GPT(CONFIG, seed=0)
    stats = make(ours, grad_clip=0.5)(0, cut(8))
    optimizer = build_optimizer(theirs, OptimizerConfig(), max_lr=1e-2)
    loss = F.cross_entropy(theirs(WINDOWS[:, :-1]).flatten(0, 1), WINDOWS[:, 1:].flatten())
    loss.backward()
    norm = torch.nn.utils.clip_grad_norm_(theirs.parameters(), 0.5)
    optimizer.step()
    torch.testing.assert_close(stats.loss_sum / 64, loss.detach())
    torch.testing.assert_close(stats.grad_norm, norm)
    for mine, other in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(mine, other, atol=1e-6, rtol=0)


@pytest.mark.parametrize("size", [1, 2, 4])
def test_accumulation_changes_nothing_but_rounding(size: int) -> None:
    whole, parts = GPT(CONFIG, seed=0), GPT(CONFIG, seed=0)
    step_whole, step_parts = make(whole), make(parts)
    for step in range(3):
        one, many = step_whole(step, cut(8)), step_parts(step, cut(size))
        torch.testing.assert_close(one.loss_sum / 64, many.loss_sum / 64, atol=1e-6, rtol=0)
        torch.testing.assert_close(one.grad_norm, many.grad_norm, atol=1e-6, rtol=1e-5)


def test_clipping_bounds_the_gradient_and_zero_leaves_it() -> None:
    for grad_clip, bound in ((1e-3, 1e-3), (0.0, None)):
        model = GPT(CONFIG, seed=0)
        seen: list[float] = []
        step = make(model, grad_clip=grad_clip)
        step._optimizer.register_step_pre_hook(
            lambda *_, m=model, s=seen: s.append(float(torch.nn.utils.get_total_norm([p.grad for p in m.parameters()])))
        )
        norm = step(0, cut(8)).grad_norm.item()
        assert seen[0] == pytest.approx(bound or norm, rel=1e-3)


def test_dropout_is_addressed_by_step_and_micro_batch_alone() -> None:
    losses = []
    for disturb in (False, True):
        step = make(GPT(CONFIG.model_copy(update={"dropout": 0.3}), seed=0))
        if disturb:
            torch.rand(100)
        losses.append([step(at, cut(4)).loss_sum.item() for at in (0, 1)])
    assert losses[0] == losses[1]
    model = GPT(CONFIG.model_copy(update={"dropout": 0.3}), seed=0)
    batch = cut(4)[0]
    draws = [
        float(make(model)._accumulate(at, MicroBatch(i, batch.inputs, batch.targets), is_last=True))
        for at, i in ((0, 0), (1, 0), (0, 1), (0, 0))
    ]
    assert len(set(draws)) == 3
    assert draws[0] == draws[3]


def test_float16_overflow_skips_the_update_and_is_counted() -> None:
    model = GPT(CONFIG, seed=0)
    before = [p.clone() for p in model.parameters()]
    skipped = torch.zeros((), dtype=torch.int64)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**120, growth_interval=1000)
    step = make(model, scaler=scaler, skipped_updates=skipped, autocast=partial(torch.autocast, "cpu", torch.float16))
    step(0, cut(8))
    assert int(skipped) == 1
    assert scaler.get_scale() == 2.0**119
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))
    scaler.load_state_dict(scaler.state_dict() | {"scale": 2.0**8})
    stats = step(1, cut(8))
    assert int(skipped) == 1
    assert stats.grad_norm.isfinite()
    assert not torch.equal(before[0], next(model.parameters()))
