import torch

from gpt.configs.gpt_config import GPTConfig
from gpt.configs.optimizer_config import OptimizerConfig
from gpt.models.gpt import GPT
from gpt.optim.build import build_optimizer, decay_groups, set_learning_rate

MODEL = GPTConfig(n_layer=1, n_head=1, n_embd=8, block_size=4, vocab_size=11)


def test_weight_decay_applies_to_matrices_only() -> None:
    model = GPT(MODEL, seed=0)
    decayed, plain = decay_groups(model, 0.1, max_lr=1e-2)
    names = {parameter: name for name, parameter in model.named_parameters()}
    assert (decayed["weight_decay"], plain["weight_decay"]) == (0.1, 0.0)
    assert all(names[p].endswith(("bias", "ln_1.weight", "ln_2.weight", "ln_f.weight")) for p in plain["params"])
    assert len(decayed["params"]) + len(plain["params"]) == len(names)
    assert "wte.weight" in {names[p] for p in decayed["params"]}


def test_updates_match_torchs_plain_adamw() -> None:
    ours, theirs = GPT(MODEL, seed=0), GPT(MODEL, seed=0)
    config = OptimizerConfig(weight_decay=0.2, beta1=0.8, beta2=0.9)
    optimizer = build_optimizer(ours, config, max_lr=4e-2)
    set_learning_rate(optimizer, 0.25)
    reference = torch.optim.AdamW(
        [
            {"params": [p for p in theirs.parameters() if p.dim() >= 2], "weight_decay": 0.2},
            {"params": [p for p in theirs.parameters() if p.dim() < 2], "weight_decay": 0.0},
        ],
        lr=1e-2,
        betas=(0.8, 0.9),
        foreach=False,
        fused=False,
    )
    for _ in range(3):
        for mine, other in zip(ours.parameters(), theirs.parameters(), strict=True):
            mine.grad = torch.randn_like(mine)
            other.grad = mine.grad.clone()
        optimizer.step()
        reference.step()
    for mine, other in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(mine, other)


def test_each_group_scales_its_own_max_lr() -> None:
    model, config = GPT(MODEL, seed=0), OptimizerConfig(name="muon", muon_lr=0.02)
    hidden = model.hidden_matrices()
    optimizer = build_optimizer(model, config, max_lr=1e-3, hidden=hidden)
    for multiplier in (1.0, 0.5, 0.0):
        set_learning_rate(optimizer, multiplier)
        rates = [group["lr"] for group in optimizer.param_groups]
        assert rates == [0.02 * multiplier, 1e-3 * multiplier, 1e-3 * multiplier]
