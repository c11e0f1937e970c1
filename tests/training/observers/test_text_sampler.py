from dataclasses import replace

from gpt.configs.gpt_config import GPTConfig
from gpt.configs.observer_config import TextSampleConfig
from gpt.data.tokenizer_builders import build_byte_tokenizer
from gpt.models.gpt import GPT
from gpt.training.events import StepEnd, TextSampled
from gpt.training.observers.text_sampler import TextSampler
from tests.training.test_logger import PLAN


def test_each_prompt_is_sampled_when_the_model_is_evaluated() -> None:
    tokenizer = build_byte_tokenizer()
    model = GPT(GPTConfig(n_layer=1, n_head=1, n_embd=8, block_size=256, vocab_size=257), seed=0)
    prompts = {prompt: tokenizer.encode_prompt(prompt) for prompt in ("", "def")}
    config = TextSampleConfig(max_new_tokens=5, temperature=0)
    sampler = TextSampler(model, tokenizer, prompts, config, replace(PLAN, eval_interval=10))
    assert [list(sampler.on_event(StepEnd(step, 0))) for step in (9, 11)] == [[], []]
    texts = list(sampler.on_event(StepEnd(10, 0)))
    assert [(text.step, text.prompt) for text in texts if isinstance(text, TextSampled)] == [(10, ""), (10, "def")]
    assert texts == list(sampler.on_event(StepEnd(10, 0)))
    assert model.training
