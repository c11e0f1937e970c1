"""The observer that generates samples during a run."""

from collections.abc import Iterable, Mapping

import torch
from torch import nn

from gpt.configs.observer_config import TextSampleConfig
from gpt.configs.run_plan import RunPlan
from gpt.data.tokenizer import Tokenizer
from gpt.inference.generate import generate
from gpt.training.events import Command, Event, TextSampled, is_evaluated
from gpt.training.observer import Observer
from gpt.training.step_timer import StepTimer
from gpt.utils.helper import Purpose, random_bits


class TextSampler(Observer):
    """Generates a sample for each prompt when the model is evaluated.

    Args:
        model: the bare module.
        tokenizer: decodes samples.
        prompts: prompt -> its token ids, at least one.
        config: length and sampling filters.
        plan: names the steps, and gives block_size and the seed.
        timer: measures the sampling; None: nobody reads its time.
    """

    def __init__(
        self,
        model: nn.Module,
        tokenizer: Tokenizer,
        prompts: Mapping[str, list[int]],
        config: TextSampleConfig,
        plan: RunPlan,
        timer: StepTimer | None = None,
    ):
        self._model, self._tokenizer, self._prompts = model, tokenizer, prompts
        self._config, self._plan = config, plan
        self._timer = timer or StepTimer(torch.device("cpu"))

    def on_event(self, event: Event) -> Iterable[Command | Event]:
        """Generate samples if this step is evaluated."""
        if not is_evaluated(event, self._plan):
            return ()
        with self._timer.phase("sampling"):
            return [
                TextSampled(
                    event.step,
                    prompt,
                    self._generate(prompt, tokens, random_bits(self._plan.seed, Purpose.TEXT, event.step, index)),
                )
                for index, (prompt, tokens) in enumerate(self._prompts.items())
            ]

    def _generate(self, prompt: str, tokens: list[int], seed: int) -> str:
        token_ids = generate(
            self._model,
            tokens,
            self._config,
            block_size=self._plan.batch.block_size,
            vocab_size=self._tokenizer.vocab_size,
            seed=seed,
            end_of_text=self._tokenizer.end_of_text,
        )
        with torch.compiler.set_stance("force_eager"):  # it would recompile for every length
            return "".join(self._tokenizer.decode_stream(token_ids, prompt=tokens if prompt else ()))
