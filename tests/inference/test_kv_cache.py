"""The cache changes nothing: the same logits and tokens as a full forward pass over the whole text."""

from collections.abc import Sequence

import pytest
import torch

from gpt.configs.gpt_config import GPTConfig
from gpt.inference.generate import decode, prefill
from gpt.inference.kv_cache import KVCache
from gpt.models.gpt import GPT
from tests.inference.families import FAMILIES, build_config

CPU = torch.device("cpu")
PROMPTS = [[3, 1, 4, 1, 5], [9], [2, 6, 5]]


def build_model(config: GPTConfig) -> GPT:
    model = GPT(config, seed=0).eval()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():  # larger than at init, so that every path matters
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.1)
    return model


def build_cache(config: GPTConfig, n_rows: int) -> KVCache:
    return KVCache(config, n_rows=n_rows, capacity=config.block_size, dtype=torch.float32, device=CPU)


@torch.no_grad()
def last_logits(model: GPT, tokens: Sequence[int]) -> torch.Tensor:
    return model(torch.tensor([list(tokens)]))[0, -1]


@pytest.mark.parametrize("family", FAMILIES)
def test_cached_logits_equal_those_of_a_full_forward_pass(family: str) -> None:
    model = build_model(build_config(family))
    rows = [list(prompt) for prompt in PROMPTS]
    cache = build_cache(model.config, len(rows))
    logits = prefill(model, cache, rows)
    while max(map(len, rows)) < model.config.block_size:
        expected = torch.stack([last_logits(model, row) for row in rows])
        torch.testing.assert_close(logits, expected, atol=2e-5, rtol=0)
        tokens = expected.argmax(dim=1).tolist()
        assert logits.argmax(dim=1).tolist() == tokens
        for row, token in zip(rows, tokens, strict=True):
            row.append(token)
        logits = decode(model, cache, tokens)


@pytest.mark.parametrize("family", FAMILIES)
def test_prefill_is_bit_exact(family: str) -> None:
    model = build_model(build_config(family))
    outputs: list[torch.Tensor] = []
    model.h[-1].register_forward_hook(lambda module, inputs, output: outputs.append(output))
    tokens = torch.randint(50, (3, 10), generator=torch.Generator().manual_seed(0))
    prefill(model, build_cache(model.config, 3), tokens.tolist())
    with torch.no_grad():
        model(tokens)
    assert torch.equal(outputs[0], outputs[1])


@pytest.mark.parametrize("family", FAMILIES)
def test_row_does_not_depend_on_the_other_rows_bit_exactly(family: str) -> None:
    model = build_model(build_config(family))

    def generate_row(others: Sequence[Sequence[int]]) -> torch.Tensor:
        cache = build_cache(model.config, 3)
        logits = [prefill(model, cache, [PROMPTS[0], *others])[0]]
        for token in (7, 8, 9):
            logits.append(decode(model, cache, [token, token + 1, len(others[0])])[0])
        return torch.stack(logits)

    assert torch.equal(generate_row(PROMPTS[1:]), generate_row([[10, 11], [12, 13, 14, 15]]))


def test_moved_row_goes_on_as_before() -> None:
    model = build_model(build_config("llama, grouped heads"))
    cache = build_cache(model.config, 3)
    prefill(model, cache, PROMPTS)
    cache.move_row(2, 0)
    assert cache.lengths == [3, 1, 0]
    logits = decode(model, cache, [7, 8])
    torch.testing.assert_close(logits[0], last_logits(model, [*PROMPTS[2], 7]), atol=2e-5, rtol=0)
    torch.testing.assert_close(logits[1], last_logits(model, [*PROMPTS[1], 8]), atol=2e-5, rtol=0)


def test_prompts_added_later_are_read_into_the_next_rows() -> None:
    model = build_model(build_config("gpt2"))
    cache = build_cache(model.config, 3)
    prefill(model, cache, PROMPTS[:1])
    logits = prefill(model, cache, PROMPTS[1:], first_row=1)
    torch.testing.assert_close(logits[1], last_logits(model, PROMPTS[2]), atol=2e-5, rtol=0)
    assert cache.lengths == [5, 1, 3]
    assert cache.n_bytes == 2 * 2 * 3 * 32 * 24 * 4
