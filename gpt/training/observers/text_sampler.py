"""The observer that generates samples during a run."""

from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import nn

from gpt.configs.observer_config import TextSampleConfig
from gpt.configs.run_plan import RunPlan
from gpt.data.tokenizer import Tokenizer
from gpt.inference.generate import Completion, generate
from gpt.inference.text import CompletionText
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
        plan: names the steps, and gives the model's configuration and the seed.
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
        if not self._prompts or not is_evaluated(event, self._plan):
            return ()
        seeds = [random_bits(self._plan.seed, Purpose.TEXT, event.step, index) for index in range(len(self._prompts))]
        with self._timer.phase("sampling"):
            texts = self._generate(seeds)
        return [TextSampled(event.step, prompt, text) for prompt, text in zip(self._prompts, texts, strict=True)]

    def _generate(self, seeds: Sequence[int]) -> list[str]:
        """Return a sample for each prompt; all are generated together."""
        completions = [
            Completion(ids, self._config, seed) for ids, seed in zip(self._prompts.values(), seeds, strict=True)
        ]
        texts = {
            completion: CompletionText(completion, self._tokenizer, joined_to=completion.prompt if prompt else ())
            for prompt, completion in zip(self._prompts, completions, strict=True)
        }
        pieces = {completion: list[str]() for completion in completions}
        generated = generate(
            self._model,
            self._plan.model.resolve(),
            completions,
            vocab_size=self._tokenizer.vocab_size,
            end_of_text=self._tokenizer.end_of_text,
        )
        with torch.compiler.set_stance("force_eager"):  # it would recompile for every length
            for completion in generated:
                pieces[completion].append(texts[completion].read())
        return ["".join(pieces[completion]) for completion in completions]
