"""A trained model with its tokenizer: text in, text out."""

import logging
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, overload

import numpy as np
import torch
import torch.nn.functional as F
from pydantic import ValidationError

from gpt.configs.explain import explain_validation_error
from gpt.configs.observer_config import SampleConfig
from gpt.data.chat_template import ChatTemplate
from gpt.data.tokenizer import Tokenizer
from gpt.errors import UserError
from gpt.inference.generate import Completion, generate, require_fitting_prompt, require_known_tokens
from gpt.inference.text import CompletionText
from gpt.models.gpt import GPT
from gpt.utils.helper import plural

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class TokenScore:
    """The loss of one token of a text."""

    token: int
    text: str
    nats: float | None
    """Negative log-likelihood given the tokens before it; None for a first token that nothing comes before."""


class LanguageModel:
    """A trained model with its tokenizer; `gpt.load` returns one.

    Args:
        model: the model, in evaluation mode.
        tokenizer: the tokenizer that it was trained with.
        dtype: dtype of matmuls; bfloat16 after `round_weights_to_bfloat16`.
        chat_template: template of the tokenizer's folder; None if the model is none for conversations.
    """

    def __init__(
        self,
        model: GPT,
        tokenizer: Tokenizer,
        dtype: torch.dtype = torch.float32,
        chat_template: ChatTemplate | None = None,
    ):
        self.model, self.tokenizer, self.dtype, self.chat_template = model, tokenizer, dtype, chat_template

    @property
    def block_size(self) -> int:
        """Longest context in tokens."""
        return self.model.config.block_size

    @overload
    def generate(self, prompt: str = "", *, seed: int = 0, **settings: Any) -> str: ...
    @overload
    def generate(self, prompt: Sequence[str], *, seed: int = 0, **settings: Any) -> list[str]: ...
    def generate(self, prompt: str | Sequence[str] = "", *, seed: int = 0, **settings: Any) -> str | list[str]:
        """Return the text that continues a prompt, or several texts for several prompts, generated together.

        Args:
            prompt: text to continue; an empty prompt begins a new document.
            seed: seed of the first text; the next prompt has the next seed.
            settings: fields of `SampleConfig`, such as max_new_tokens and temperature.

        Raises:
            UserError: a wrong setting, or a prompt that does not fit the context.
        """
        config = check_settings(settings)
        prompts = [prompt] if isinstance(prompt, str) else list(prompt)
        texts = [self.build_completion(text, config, seed + index) for index, text in enumerate(prompts)]
        pieces = {text: list[str]() for text in texts}
        for text, piece in self.run(texts):
            pieces[text].append(piece)
        results = ["".join(pieces[text]) for text in texts]
        return results[0] if isinstance(prompt, str) else results

    def stream(self, prompt: str = "", *, seed: int = 0, **settings: Any) -> Iterator[str]:
        """Yield the text that continues a prompt piece by piece, while it is generated; no character is ever cut.

        Args:
            prompt: text to continue; an empty prompt begins a new document.
            seed: the same seed gives the same text.
            settings: fields of `SampleConfig`, such as max_new_tokens and temperature.

        Raises:
            UserError: a wrong setting, or a prompt that does not fit the context.
        """
        text = self.build_completion(prompt, check_settings(settings), seed)
        return (piece for _, piece in self.run([text]) if piece)

    def score(self, text: str) -> float:
        """Return the mean loss of a text's tokens, in nats per token.

        Raises:
            UserError: the text is empty, or its only token has nothing before it.
        """
        nats = [score.nats for score in self.score_tokens(text) if score.nats is not None]
        if not nats:
            raise UserError(f"{text!r} has no token to score: give a longer text")
        return math.fsum(nats) / len(nats)

    def score_tokens(self, text: str) -> list[TokenScore]:
        """Return the loss of each token of a text.

        A token is scored given all tokens before it, the end-of-text token that begins a document included. In a text
        longer than the context, it is scored given at least the last half of a context.
        """
        ids = self.tokenizer.encode(text).tolist()
        start = self.tokenizer.document_start.tolist()
        losses = self._compute_losses([*start, *ids])
        nats = losses if start else [None, *losses]
        pieces = split_text(self.tokenizer, ids)
        return [TokenScore(*values) for values in zip(ids, pieces, nats[: len(ids)], strict=True)]

    def build_completion(
        self, prompt: str | Sequence[int], config: SampleConfig, seed: int, place: str = "prompt"
    ) -> CompletionText:
        """Return the text of a completion that is not yet begun.

        Args:
            prompt: text to continue, or its token ids.
            config: settings.
            seed: seed of the text.
            place: name of the prompt in messages.

        Raises:
            UserError: the prompt does not fit the context or the vocabulary, or a stop token is unknown.
        """
        try:
            ids = self._encode_prompt(prompt, place) if isinstance(prompt, str) else self._check_ids(prompt)
            require_fitting_prompt(ids, self.block_size)
        except UserError as error:
            raise UserError(f"{place}: {error}") from error
        require_known_tokens(config.stop_tokens, self.tokenizer.vocab_size)
        # The end-of-text token before a new document is not part of it.
        return CompletionText(Completion(ids, config, seed), self.tokenizer, joined_to=ids if prompt else ())

    def _encode_prompt(self, prompt: str, place: str) -> list[int]:
        """Return the ids of a prompt; warn of characters that have none."""
        ids = self.tokenizer.encode_prompt(prompt)
        lost = self.tokenizer.find_unrepresented(prompt, np.array(ids))
        if lost is not None:
            characters = plural(lost.characters, "character")
            log.warning("%s: the tokenizer has no token for %s, first %s", place, characters, lost.first)
        return ids

    def _check_ids(self, ids: Sequence[int]) -> list[int]:
        unknown = [token for token in ids if not 0 <= token < self.tokenizer.vocab_size]
        if unknown or not ids:
            named = f"token {unknown[0]} is not in the vocabulary" if unknown else "no tokens"
            raise UserError(f"{named}; ids are 0 to {self.tokenizer.vocab_size - 1}")
        return list(ids)

    def run(self, texts: Sequence[CompletionText]) -> Iterator[tuple[CompletionText, str]]:
        """Generate completions together; yield each at each of its tokens, with its next piece of text, often empty."""
        texts_of = {text.completion: text for text in texts}
        for completion in self._generate([*texts_of]):
            yield texts_of[completion], texts_of[completion].read()
            if completion.finish_reason == "context":
                log.warning(
                    "the text ends after %s of at most %s: the context of the model (block_size=%s) is full",
                    plural(len(completion.tokens), "new token"),
                    f"{completion.config.max_new_tokens:,}",
                    f"{self.block_size:,}",
                )

    def _generate(self, completions: Sequence[Completion]) -> Iterator[Completion]:
        return generate(
            self.model,
            self.model.config,
            completions,
            vocab_size=self.tokenizer.vocab_size,
            end_of_text=self.tokenizer.end_of_text,
            dtype=self.dtype,
        )

    @torch.no_grad()
    def _compute_losses(self, ids: list[int]) -> list[float]:
        """Return the loss of each id but the first, in nats."""
        losses, device = list[float](), self.model.wte.weight.device
        autocast = torch.autocast(device.type, self.dtype, enabled=self.dtype != torch.float32)
        while len(losses) < len(ids) - 1:
            begin = max(0, len(losses) + 1 - max(1, self.block_size // 2))
            window = torch.tensor(ids[begin : begin + self.block_size + 1], device=device)
            with autocast:
                logits = self.model(window[None, :-1])[0].float()  # (T, V)
            losses += F.cross_entropy(logits, window[1:], reduction="none")[len(losses) - begin :].tolist()
        return losses


def check_settings(settings: dict[str, Any]) -> SampleConfig:
    """Return a checked configuration.

    Raises:
        UserError: an unknown setting, or a value that it does not allow.
    """
    try:
        return SampleConfig.model_validate(settings)
    except ValidationError as error:
        raise UserError(explain_validation_error(error, SampleConfig, as_flag=False)) from error


def split_text(tokenizer: Tokenizer, ids: Sequence[int]) -> list[str]:
    """Return the text of each id; a character of several tokens belongs to the last of them."""
    decoder = tokenizer.build_stream_decoder()
    pieces = [decoder.push(index) for index in ids]
    if pieces:
        pieces[-1] += decoder.finish()
    return pieces
