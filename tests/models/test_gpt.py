import math

import pytest
import torch
import torch.nn.functional as F

from gpt.configs.gpt_config import INIT_STD, GPTConfig
from gpt.models.gpt import GPT

CONFIG = GPTConfig(n_layer=2, n_head=2, n_embd=32, block_size=16, vocab_size=50)
MODERN = CONFIG.model_copy(
    update={"bias": False, "position": "rotary", "norm": "rmsnorm", "mlp": "relu2", "qk_norm": True}
    | {"logit_softcap": 15.0}
)


@pytest.mark.parametrize("config", [CONFIG, MODERN.model_copy(update={"n_kv_head": 1})])
def test_attention_is_causal(config: GPTConfig) -> None:
    model = GPT(config, seed=0).eval()
    tokens = torch.randint(50, (2, 16), generator=torch.Generator().manual_seed(0))
    changed = tokens.clone()
    changed[:, 9:] = (changed[:, 9:] + 1) % 50
    before, after = model(tokens), model(changed)
    assert torch.equal(before[:, :9], after[:, :9])
    assert not torch.equal(before[:, 9:], after[:, 9:])


def test_initial_weights_depend_on_the_seed_alone() -> None:
    torch.manual_seed(1)
    first = GPT(CONFIG, seed=5).state_dict()
    torch.manual_seed(2)
    second, other = GPT(CONFIG, seed=5).state_dict(), GPT(CONFIG, seed=6).state_dict()
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert not torch.equal(first["wte.weight"], other["wte.weight"])


def test_init_is_gpt2s_with_scaled_residual_projections() -> None:
    model = GPT(GPTConfig(n_layer=8, n_head=2, n_embd=128, block_size=64, vocab_size=500), seed=0)
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            assert not parameter.any()
        elif parameter.dim() == 1:
            assert torch.equal(parameter, torch.ones_like(parameter))
        else:
            expected = INIT_STD / math.sqrt(16) if name.endswith("c_proj.weight") else INIT_STD
            assert parameter.std().item() == pytest.approx(expected, rel=0.05)


def test_initial_loss_is_that_of_a_uniform_distribution() -> None:
    model = GPT(CONFIG, seed=0)
    tokens = torch.randint(50, (4, 16), generator=torch.Generator().manual_seed(0))
    assert model(tokens, tokens.roll(1)).item() / 64 == pytest.approx(math.log(50), abs=0.1)


def test_without_bias_no_parameter_is_a_bias() -> None:
    names = GPT(CONFIG.model_copy(update={"bias": False}), seed=0).state_dict()
    assert not [name for name in names if name.endswith("bias")]


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(
    "change",
    [
        {},
        {"position": "rotary", "mlp": "relu2"},
        {"norm": "rmsnorm", "mlp": "swiglu"},
        {"qk_norm": True, "n_kv_head": 1},
        {"norm": "rmsnorm", "qk_norm": True},
        {"head_dim": 10, "intermediate_size": 24, "n_kv_head": 1},
        {"tie_embeddings": False, "mlp": "swiglu", "intermediate_size": 24},
        {"qkv_bias": True, "attn_out_bias": False},
        {"qkv_bias": False, "mlp_bias": True},
    ],
)
def test_n_parameters_counts_the_models(bias: bool, change: dict[str, object]) -> None:
    config = CONFIG.model_copy(update={"bias": bias, **change})
    assert config.n_parameters == sum(parameter.numel() for parameter in GPT(config, seed=0).parameters())


@pytest.mark.parametrize("tie_embeddings", [False, True])
def test_the_loss_is_that_of_the_capped_logits(tie_embeddings: bool) -> None:
    model = GPT(MODERN.model_copy(update={"tie_embeddings": tie_embeddings}), seed=0)
    with torch.no_grad():
        (model.wte if model.lm_head is None else model.lm_head).weight.mul_(100)
    tokens = torch.randint(50, (2, 16), generator=torch.Generator().manual_seed(0))
    logits = model(tokens)
    assert 14 < logits.abs().max() <= 15
    expected = F.cross_entropy(logits.flatten(0, 1), tokens.flatten(), reduction="sum")
    torch.testing.assert_close(model(tokens, tokens), expected)


@pytest.mark.parametrize("dropped", ["drop", "attn.resid_dropout", "mlp.dropout"])
def test_dropout_acts_in_training_only(dropped: str) -> None:
    model = GPT(CONFIG.model_copy(update={"dropout": 0.5}), seed=0)
    assert next(m.p for name, m in model.named_modules() if name.endswith(dropped)) == 0.5
    tokens = torch.zeros(1, 8, dtype=torch.int64)
    assert not torch.equal(model(tokens), model(tokens))
    model.eval()
    assert torch.equal(model(tokens), model(tokens))


def test_vocab_size_zero_is_an_error() -> None:
    with pytest.raises(ValueError, match="vocab_size=0"):
        GPT(GPTConfig(), seed=0)
