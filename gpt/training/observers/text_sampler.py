"""The observer that lets the model write."""

from collections.abc import Iterable, Mapping

import torch
from torch import nn

from gpt.configs.observer_config import TextSampleConfig
from gpt.configs.run_plan import RunPlan
from gpt.data.tokenizer import Tokenizer
from gpt.inference.generate import generate
from gpt.training.events import Command, Event, TextSampled, is_evaluated
from gpt.training.observer import Observer
from gpt.utils.helper import Purpose, random_bits


class TextSampler(Observer):
    """Continues each prompt when the model is evaluated.

    Args:
        model: the bare module.
        tokenizer: turns tokens into text.
        prompts: text -> its tokens, at least one each.
        config: how tokens are drawn.
        plan: says when, and gives the context length and the seed.
    """

    def __init__(
        self,
        model: nn.Module,
        tokenizer: Tokenizer,
        prompts: Mapping[str, list[int]],
        config: TextSampleConfig,
        plan: RunPlan,
    ):
        self._model, self._tokenizer, self._prompts = model, tokenizer, prompts
        self._config, self._plan = config, plan

    def on_event(self, event: Event) -> Iterable[Command | Event]:
        """Draw a text per prompt after a step that is evaluated."""
        if not is_evaluated(event, self._plan):
            return ()
        return [
            TextSampled(
                event.step,
                prompt,
                self._continue(tokens, random_bits(self._plan.seed, Purpose.TEXT, event.step, index)),
            )
            for index, (prompt, tokens) in enumerate(self._prompts.items())
        ]

    def _continue(self, tokens: list[int], seed: int) -> str:
        new = generate(
            self._model,
            tokens,
            self._config,
            block_size=self._plan.batch.block_size,
            vocab_size=self._tokenizer.vocab_size,
            seed=seed,
            end_of_text=self._tokenizer.end_of_text,
        )
        with torch.compiler.set_stance("force_eager"):  # every length would be compiled anew
            return self._tokenizer.decode(new)
