from typing import Any

import torch
from torch import nn

from gpt.configs.gpt_config import GPTConfig
from gpt.configs.observer_config import SampleConfig
from gpt.inference.generate import generate
from gpt.models.gpt import GPT

MODEL = GPT(GPTConfig(n_layer=1, n_head=1, n_embd=16, block_size=8, vocab_size=20), seed=0)


def tokens(model: nn.Module = MODEL, prompt: tuple[int, ...] = (1, 2), **settings: Any) -> list[int]:
    config = SampleConfig(**({"max_new_tokens": 30} | settings.pop("config", {})))
    return list(generate(model, prompt, config, **({"block_size": 8, "vocab_size": 20, "seed": 0} | settings)))


def test_generation_continues_beyond_block_size() -> None:
    assert len(tokens()) == 30
    assert len(tokens(prompt=tuple(range(12)))) == 30


def test_greedy_is_deterministic_and_samples_depend_on_the_seed() -> None:
    assert tokens(config={"temperature": 0}, seed=1) == tokens(config={"temperature": 0}, seed=2)
    assert tokens(seed=1) == tokens(seed=1) != tokens(seed=2)


def test_padding_of_the_vocabulary_is_never_sampled() -> None:
    assert max(tokens(vocab_size=5, config={"temperature": 50.0})) < 5


def test_end_of_text_ends_generation_and_is_not_yielded() -> None:
    sampled = tokens(config={"temperature": 5.0})
    end = sampled[10]
    assert tokens(config={"temperature": 5.0}, end_of_text=end) == sampled[: sampled.index(end)]


def test_diverged_model_generates_nothing() -> None:
    diverged = GPT(MODEL.config, seed=0)
    diverged.ln_f.weight.data.fill_(float("nan"))
    assert tokens(diverged) == []


def test_training_mode_is_restored() -> None:
    MODEL.train()
    tokens()
    assert MODEL.training
    assert not torch.is_inference_mode_enabled()
