"""Generation of tokens after prompts: prefill reads the prompts, decode reads one new token of each row at a time.

Shapes: B rows, T prompt tokens, V = vocab_size.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import nn

from gpt.configs.gpt_config import GPTConfig
from gpt.configs.observer_config import SampleConfig
from gpt.errors import UserError
from gpt.inference.kv_cache import KVCache
from gpt.inference.sampling import sample_next_token
from gpt.utils.helper import plural

FinishReason = Literal["stop", "length", "context", "diverged"]
"""A stop token or text; max_new_tokens; a full context; logits that are not finite."""
NOT_FINITE = -1
"""Token id that stands for logits that are not finite."""


@torch.inference_mode()
def prefill(model: nn.Module, cache: KVCache, prompts: Sequence[Sequence[int]], first_row: int = 0) -> torch.Tensor:
    """Read prompts into empty rows of the cache; return the logits after each, (B, V) float32."""
    length = max(map(len, prompts))
    padded = [[*prompt, *[0] * (length - len(prompt))] for prompt in prompts]
    rows = range(first_row, first_row + len(prompts))
    return _read(model, cache, padded, rows, counts=[len(prompt) for prompt in prompts])


@torch.inference_mode()
def decode(model: nn.Module, cache: KVCache, tokens: Sequence[int]) -> torch.Tensor:
    """Read the next token of each of the first rows; return the logits after each, (B, V) float32."""
    return _read(model, cache, [[token] for token in tokens], range(len(tokens)), counts=[1] * len(tokens))


def _read(
    model: nn.Module, cache: KVCache, tokens: list[list[int]], rows: range, counts: Sequence[int]
) -> torch.Tensor:
    logits: torch.Tensor = model(torch.tensor(tokens, device=cache.device), cache=cache.extend(rows, counts))
    return logits.float()


@dataclass(frozen=True)
class TokenLogprobs:
    """Log-probabilities at one position, in nats, before temperature and filters."""

    logprob: float
    """Value of the sampled token."""
    top: dict[int, float]
    """Values of the most likely tokens, by their ids."""


@dataclass(eq=False)
class Completion:
    """A prompt and the tokens generated after it."""

    prompt: Sequence[int]
    config: SampleConfig
    seed: int
    n_top_logprobs: int | None = None
    """Number of most likely tokens to report at each position; None: no log-probabilities at all."""
    tokens: list[int] = field(default_factory=list)
    logprobs: list[TokenLogprobs] = field(default_factory=list)
    """Those of each token, where n_top_logprobs is given."""
    finish_reason: FinishReason | None = None
    """None while it is being generated; setting it ends the generation."""


class Batch:
    """Completions that are generated together; each may begin and end at any step, whatever the others do.

    The rows of the cache that are in use are its first ones: where a completion ends, the last row takes its place.

    Args:
        model: the model, in evaluation mode.
        config: its resolved configuration.
        vocab_size: the tokenizer's; ids above it, which pad the embedding, are never sampled.
        end_of_text: id of the end-of-text token; None if there is none.
        max_rows: number of completions at the same time.
        capacity: tokens of the longest prompt with its completion; 0: block_size.
        dtype: dtype of the cached keys and values.
    """

    def __init__(
        self,
        model: nn.Module,
        config: GPTConfig,
        *,
        vocab_size: int,
        end_of_text: int | None,
        max_rows: int,
        capacity: int = 0,
        dtype: torch.dtype = torch.float32,
    ):
        self._model, self._vocab_size, self._end_of_text = model, vocab_size, end_of_text
        self._device = next(model.parameters()).device
        capacity = min(capacity or config.block_size, config.block_size)
        self._cache = KVCache(config, n_rows=max_rows, capacity=capacity, dtype=dtype, device=self._device)
        self._rows: list[Completion] = []
        self._generators: list[torch.Generator] = []

    def __len__(self) -> int:
        """Return the number of completions that are being generated."""
        return len(self._rows)

    def add(self, completions: Sequence[Completion]) -> list[Completion]:
        """Read the prompts of completions and sample the first token of each; return the completions."""
        logits = prefill(self._model, self._cache, [each.prompt for each in completions], first_row=len(self._rows))
        self._generators += [torch.Generator(self._device).manual_seed(each.seed) for each in completions]
        self._rows += completions
        return self._sample(logits, first_row=len(self._rows) - len(completions))

    def step(self) -> list[Completion]:
        """Sample the next token of each completion; return the completions."""
        self.remove_finished()
        if not self._rows:
            return []
        return self._sample(decode(self._model, self._cache, [row.tokens[-1] for row in self._rows]), first_row=0)

    def remove_finished(self) -> None:
        """Free the rows of completions that have a finish reason."""
        for row in reversed(range(len(self._rows))):
            if self._rows[row].finish_reason is not None:
                last, generator = self._rows.pop(), self._generators.pop()
                self._cache.move_row(len(self._rows), row)
                if row < len(self._rows):
                    self._rows[row], self._generators[row] = last, generator

    def _sample(self, logits: torch.Tensor, first_row: int) -> list[Completion]:
        """Sample a token of each row from `first_row` on, with one host sync for all of them."""
        logits = logits[:, : self._vocab_size]
        is_finite = logits.isfinite().all(dim=1)  # (B,)
        logits = torch.where(is_finite[:, None], logits, 0)
        changed = self._rows[first_row:]
        sampled = [
            sample_next_token(row, completion.config, generator, [*completion.prompt, *completion.tokens])
            for row, completion, generator in zip(logits, changed, self._generators[first_row:], strict=True)
        ]
        tokens = torch.where(is_finite, torch.stack(sampled), NOT_FINITE).tolist()
        for completion, row, token in zip(changed, logits, tokens, strict=True):
            if token == NOT_FINITE:
                completion.finish_reason = "diverged"
                continue
            if token == self._end_of_text or token in completion.config.stop_tokens:
                completion.finish_reason = "stop"
                continue
            completion.tokens.append(token)
            if completion.n_top_logprobs is not None:
                completion.logprobs.append(_compute_logprobs(row, token, completion.n_top_logprobs))
            if len(completion.tokens) == completion.config.max_new_tokens:
                completion.finish_reason = "length"
            elif len(completion.prompt) + len(completion.tokens) > self._cache.capacity:
                completion.finish_reason = "context"
        return changed


def _compute_logprobs(logits: torch.Tensor, token: int, n_top: int) -> TokenLogprobs:
    logprobs = logits.log_softmax(dim=0)  # (V,)
    top = logprobs.topk(min(n_top, len(logprobs)))
    return TokenLogprobs(float(logprobs[token]), dict(zip(top.indices.tolist(), top.values.tolist(), strict=True)))


def generate(
    model: nn.Module,
    config: GPTConfig,
    completions: Sequence[Completion],
    *,
    vocab_size: int,
    end_of_text: int | None,
    dtype: torch.dtype = torch.float32,
) -> Iterator[Completion]:
    """Generate completions together; yield each whenever it has a new token or has ended.

    Args:
        model: the model; in evaluation mode meanwhile.
        config: its resolved configuration.
        completions: prompts that fit the context, with their settings.
        vocab_size: the tokenizer's.
        end_of_text: id of the end-of-text token; None if there is none.
        dtype: dtype of the cached keys and values.
    """
    longest = max(len(each.prompt) + min(each.config.max_new_tokens, config.block_size) for each in completions)
    with evaluation_mode(model):
        batch = Batch(
            model,
            config,
            vocab_size=vocab_size,
            end_of_text=end_of_text,
            max_rows=len(completions),
            capacity=longest,
            dtype=dtype,
        )
        yield from batch.add(completions)
        while batch:
            yield from batch.step()


def require_fitting_prompt(prompt: Sequence[int], block_size: int) -> None:
    """Check that the model can continue a prompt.

    Raises:
        UserError: the prompt is longer than the context.
    """
    if len(prompt) > block_size:
        raise UserError(
            f"{plural(len(prompt), 'token')} exceed the context of the model (block_size={block_size}), which is not "
            "shifted; shorten the text"
        )


def require_known_tokens(stop_tokens: Sequence[int], vocab_size: int) -> None:
    """Check that the vocabulary has all stop tokens.

    Raises:
        UserError: it lacks one.
    """
    unknown = [token for token in stop_tokens if not 0 <= token < vocab_size]
    if unknown:
        raise UserError(f"stop token {unknown[0]} is not in the vocabulary, whose ids are 0 to {vocab_size - 1}")


@contextmanager
def evaluation_mode(model: nn.Module) -> Iterator[None]:
    """Turn dropout off meanwhile."""
    was_training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(was_training)
