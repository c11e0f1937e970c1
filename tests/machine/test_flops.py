from collections import Counter

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from gpt.configs.gpt_config import GPTConfig
from gpt.machine.flops import flops_per_token, linear_layers
from gpt.models.gpt import GPT

SIZES = {"n_layer": 3, "n_head": 4, "n_embd": 32, "block_size": 16, "vocab_size": 96}
MODELS = {
    "gpt2": GPTConfig(**SIZES),
    "grouped": GPTConfig(**SIZES, n_kv_head=2, position="rotary", qk_norm=True),
    "swiglu": GPTConfig(**SIZES, mlp="swiglu", norm="rmsnorm", bias=False, logit_softcap=15),
    "wide heads": GPTConfig(**SIZES, head_dim=12, intermediate_size=40, n_kv_head=2),
}


@pytest.mark.parametrize("name", MODELS)
def test_flops_are_those_that_torch_counts_without_masked_scores(name: str) -> None:
    config = MODELS[name].resolve()
    model = GPT(config, seed=0)
    tokens = torch.randint(config.vocab_size, (2, config.block_size))
    # In bfloat16, for there attention is made of matrix products, all of which torch counts.
    with FlopCounterMode(display=False) as counter, torch.autocast("cpu", torch.bfloat16):
        model(tokens, tokens).backward()
    masked = (
        6 * config.n_layer * config.n_head * config.head_dim * config.block_size
    )  # half of attention: computed, and not needed
    assert counter.get_total_flops() == tokens.numel() * (flops_per_token(config) + masked)


@pytest.mark.parametrize("name", MODELS)
def test_linear_layers_are_those_of_the_model(name: str) -> None:
    config = MODELS[name].resolve()
    modules = [module for module in GPT(config, seed=0).modules() if isinstance(module, nn.Linear)]
    expected = Counter((module.in_features, module.out_features) for module in modules)
    expected[config.n_embd, config.vocab_size] += 1
    found: Counter[tuple[int, int]] = Counter()
    for n_in, n_out, layers in linear_layers(config):
        found[n_in, n_out] += layers
    assert found == expected


def test_a_sliding_window_leaves_out_the_scores_outside_it() -> None:
    config = GPTConfig(**SIZES).resolve()
    scores = [min(query, 5) for query in range(1, config.block_size + 1)]
    outside = sum(range(1, config.block_size + 1)) - sum(scores)
    saved = (flops_per_token(config) - flops_per_token(config.with_(sliding_window=5))) * config.block_size
    per_score = 12 * config.n_layer * config.n_head * config.head_dim
    # A triangle of n scores a side counts n * n / 2, without half of its diagonal.
    assert saved == per_score * (outside - (config.block_size - 5) / 2)
    assert flops_per_token(config.with_(sliding_window=16)) == flops_per_token(config)
