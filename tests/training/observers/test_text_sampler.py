from collections.abc import Sequence
from dataclasses import replace

import pytest
import torch
from torch import nn

from gpt.configs.gpt_config import GPTConfig
from gpt.configs.observer_config import TextSampleConfig
from gpt.data.tokenizer import Tokenizer
from gpt.data.tokenizer_builders import build_byte_tokenizer
from gpt.models.gpt import GPT
from gpt.ops.attention import Cache
from gpt.training.events import StepEnd, TextSampled
from gpt.training.observers.text_sampler import TextSampler
from tests.data.tokenizer_families import add_tokens, build_byte_fallback
from tests.training.example_events import PLAN


def test_each_prompt_is_sampled_when_the_model_is_evaluated() -> None:
    tokenizer = build_byte_tokenizer()
    model = GPT(GPTConfig(n_layer=1, n_head=1, n_embd=8, block_size=256, vocab_size=257), seed=0)
    prompts = {prompt: tokenizer.encode_prompt(prompt) for prompt in ("", "def")}
    config = TextSampleConfig(max_new_tokens=5, temperature=0)
    sampler = TextSampler(model, tokenizer, prompts, config, replace(PLAN, model=model.config, eval_interval=10))
    assert [list(sampler.on_event(StepEnd(step, 0))) for step in (9, 11)] == [[], []]
    texts = list(sampler.on_event(StepEnd(10, 0)))
    assert [(text.step, text.prompt) for text in texts if isinstance(text, TextSampled)] == [(10, ""), (10, "def")]
    assert texts == list(sampler.on_event(StepEnd(10, 0)))
    assert model.training


def test_samples_read_each_token_once() -> None:
    model = GPT(GPTConfig(n_layer=1, n_head=1, n_embd=8, block_size=256, vocab_size=257), seed=0)
    tokenizer, n_read = build_byte_tokenizer(), list[int]()
    model.register_forward_pre_hook(lambda module, inputs: n_read.append(inputs[0].numel()))
    prompts = {"def": tokenizer.encode_prompt("def")}
    config = TextSampleConfig(max_new_tokens=5, temperature=0)
    sampler = TextSampler(model, tokenizer, prompts, config, replace(PLAN, model=model.config, eval_interval=10))
    sampler.on_event(StepEnd(10, 0))
    assert n_read == [3, 1, 1, 1, 1]


class FixedModel(nn.Module):
    """A model that predicts given tokens, one after the other."""

    config: GPTConfig

    def __init__(self, tokens: Sequence[int], vocab_size: int):
        super().__init__()
        self._weight = nn.Parameter(torch.zeros(1))
        self._tokens, self._vocab_size = iter(tokens), vocab_size

    def forward(self, tokens: torch.Tensor, cache: Cache) -> torch.Tensor:
        """Return logits that prefer the next of the given tokens."""
        logits = torch.zeros(1, self._vocab_size)
        logits[:, next(self._tokens)] = 1.0
        return logits


@pytest.mark.parametrize(("prompt", "expected"), [("one two", " the \ufffda"), ("", "the \ufffda")])
def test_sample_joins_its_prompt_and_shows_bytes_that_are_not_utf8(prompt: str, expected: str) -> None:
    tokenizer = Tokenizer(add_tokens(build_byte_fallback(), ["</s>"]).to_str())
    tokens = [*tokenizer.encode("the ").tolist(), 3 + 0x80, int(tokenizer.encode("a")[-1]), tokenizer.end_of_text or 0]
    config = TextSampleConfig(max_new_tokens=10, temperature=0)
    prompts = {prompt: tokenizer.encode_prompt(prompt)}
    model = FixedModel(tokens, tokenizer.vocab_size)
    sampler = TextSampler(model, tokenizer, prompts, config, replace(PLAN, eval_interval=10))
    (sample,) = sampler.on_event(StepEnd(10, 0))
    assert isinstance(sample, TextSampled)
    assert sample.text == expected
