from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import nn

from gpt.configs.gpt_config import GPTConfig
from gpt.configs.observer_config import SampleConfig
from gpt.errors import UserError
from gpt.inference.generate import Batch, Completion, generate, require_fitting_prompt, require_known_tokens
from gpt.inference.sampling import sample_next_token
from gpt.models.gpt import GPT
from tests.inference.families import FAMILIES, build_config
from tests.inference.test_kv_cache import build_model, last_logits

CONFIG = GPTConfig(n_layer=1, n_head=1, n_embd=16, block_size=48, vocab_size=257).resolve()
MODEL = GPT(CONFIG, seed=0)


def complete(
    *prompts: Sequence[int],
    model: nn.Module = MODEL,
    vocab_size: int = 257,
    end_of_text: int | None = None,
    seed: int = 0,
    **settings: Any,
) -> list[Completion]:
    config = SampleConfig(**({"max_new_tokens": 30} | settings))
    completions = [Completion(prompt, config, seed) for prompt in prompts]
    for _ in generate(model, CONFIG, completions, vocab_size=vocab_size, end_of_text=end_of_text):
        pass
    return completions


def tokens(prompt: Sequence[int] = (1, 2), **settings: Any) -> list[int]:
    return complete(prompt, **settings)[0].tokens


def generate_uncached(model: GPT, prompt: Sequence[int], config: SampleConfig, seed: int) -> list[int]:
    """Run a full forward pass for every token."""
    generator, text = torch.Generator().manual_seed(seed), list(prompt)
    for _ in range(config.max_new_tokens):
        text.append(int(sample_next_token(last_logits(model, text), config, generator, text)))
    return text[len(prompt) :]


@pytest.mark.parametrize("settings", [{"temperature": 0}, {"temperature": 1.0, "repetition_penalty": 1.3}])
@pytest.mark.parametrize("family", FAMILIES)
def test_cached_generation_gives_the_tokens_of_uncached_generation(family: str, settings: dict[str, Any]) -> None:
    model = build_model(build_config(family))
    prompts, config = [[3, 1, 4, 1, 5], [9], [2, 6, 5]], SampleConfig(max_new_tokens=16, **settings)
    completions = [Completion(prompt, config, seed) for seed, prompt in enumerate(prompts)]
    for _ in generate(model, model.config, completions, vocab_size=50, end_of_text=None):
        pass
    expected = [generate_uncached(model, prompt, config, seed) for seed, prompt in enumerate(prompts)]
    assert [completion.tokens for completion in completions] == expected


def test_generation_ends_where_the_context_is_full() -> None:
    # The last new token is never read, so there is room for one more than block_size.
    (completion,) = complete((1, 2, 3), max_new_tokens=100)
    assert (len(completion.tokens), completion.finish_reason) == (46, "context")
    (completion,) = complete(range(48), max_new_tokens=100)
    assert (len(completion.tokens), completion.finish_reason) == (1, "context")
    (completion,) = complete((1, 2, 3), max_new_tokens=46)
    assert (len(completion.tokens), completion.finish_reason) == (46, "length")


def test_prompt_that_exceeds_the_context_is_refused() -> None:
    require_fitting_prompt(range(48), 48)
    with pytest.raises(
        UserError, match=r"49 tokens exceed the context of the model \(block_size=48\), which is not shifted"
    ):
        require_fitting_prompt(range(49), 48)


def test_stop_token_outside_the_vocabulary_is_refused() -> None:
    require_known_tokens([0, 256], 257)
    with pytest.raises(UserError, match="stop token 257 is not in the vocabulary, whose ids are 0 to 256"):
        require_known_tokens([3, 257], 257)


def test_greedy_is_deterministic_and_samples_depend_on_the_seed() -> None:
    assert tokens(temperature=0, seed=1) == tokens(temperature=0, seed=2)
    assert tokens(seed=1) == tokens(seed=1) != tokens(seed=2)


def test_padding_of_the_vocabulary_is_never_sampled() -> None:
    assert max(tokens(vocab_size=5, temperature=50.0)) < 5


def test_end_of_text_and_stop_tokens_end_generation_and_are_not_part_of_it() -> None:
    sampled = tokens(temperature=5.0)
    end = sampled[10]
    before = sampled[: sampled.index(end)]
    assert tokens(temperature=5.0, end_of_text=end) == before
    (completion,) = complete((1, 2), temperature=5.0, stop_tokens=(256, end))
    assert (completion.tokens, completion.finish_reason) == (before, "stop")


def test_diverged_model_generates_nothing() -> None:
    diverged = GPT(CONFIG, seed=0)
    diverged.ln_f.weight.data.fill_(float("nan"))
    (completion,) = complete((1, 2), model=diverged)
    assert (completion.tokens, completion.finish_reason) == ([], "diverged")


def test_row_that_diverges_does_not_disturb_the_others() -> None:
    model = GPT(CONFIG.model_copy(update={"tie_embeddings": False}), seed=0).eval()
    (expected,) = complete((1, 2), model=model, vocab_size=256)
    model.wte.weight.data[256] = torch.nan
    diverged, other = complete((1, 256), (1, 2), model=model, vocab_size=256)
    assert (diverged.tokens, diverged.finish_reason) == ([], "diverged")
    assert (other.tokens, other.finish_reason) == (expected.tokens, "length")


def test_training_mode_is_restored() -> None:
    MODEL.train()
    tokens()
    assert MODEL.training
    assert not torch.is_inference_mode_enabled()
    next(generate(MODEL, CONFIG, [Completion((1, 2), SampleConfig(), 0)], vocab_size=257, end_of_text=None))
    assert MODEL.training


def test_completions_that_begin_and_end_at_different_steps_do_not_disturb_each_other() -> None:
    model = build_model(CONFIG)
    lengths = [7, 3, 12, 5, 9, 4]
    configs = [SampleConfig(max_new_tokens=n, temperature=1.0) for n in lengths]
    alone = [Completion([seed, 9], config, seed) for seed, config in enumerate(configs)]
    together = [Completion([seed, 9], config, seed) for seed, config in enumerate(configs)]
    for completion in alone:
        assert list(generate(model, CONFIG, [completion], vocab_size=257, end_of_text=None))
    batch, waiting = Batch(model.eval(), CONFIG, vocab_size=257, end_of_text=None, max_rows=3), list(together)
    while waiting or batch:
        batch.step()
        batch.remove_finished()
        if waiting and len(batch) < 3:
            batch.add([waiting.pop(0)])
    assert [each.tokens for each in together] == [each.tokens for each in alone]
    assert [len(each.tokens) for each in together] == lengths
    assert {each.finish_reason for each in together} == {"length"}
