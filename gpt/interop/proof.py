"""Compare a model here with its export in the runtime that the export is for: logits, greedy text and tokenization."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch

from gpt.data.tokenizer import Tokenizer
from gpt.errors import UserError
from gpt.interop.awkward_texts import AWKWARD_TEXTS, UNSEEN_TEXT
from gpt.models.gpt import GPT

MAX_COMPARED_TOKENS = 256
"""Tokens of a row whose logits are compared."""
GREEDY_TOKENS = 64
"""Tokens that are generated."""
PROMPT_TOKENS = 16
"""Tokens of the prompt of the greedy continuation."""


class Runtime(Protocol):
    """Another program with the exported model loaded."""

    name: str
    """Its name and version."""

    def encode(self, text: str) -> list[int]:
        """Return the ids of ordinary text, in which no special token is recognized and to which none is added."""
        ...

    def compute_logits(self, ids: Sequence[int]) -> torch.Tensor:
        """Return the logits after each token, (T, V) float32."""
        ...

    def continue_greedily(self, ids: Sequence[int], n_tokens: int) -> list[int]:
        """Return the most likely next token, `n_tokens` times."""
        ...


@dataclass(frozen=True)
class Proof:
    """Result of a comparison that succeeded."""

    runtime: str
    logits_difference: float
    """Largest difference of two logits."""
    logits_scale: float
    """Largest logit."""
    compared_tokens: int
    """Tokens after which all logits were compared."""
    greedy_tokens: int
    """Tokens of the greedy continuation that are equal."""
    greedy_tie: bool
    """The continuation ends at two tokens whose logits differ by less than rounding."""
    texts: int
    """Texts that are tokenized identically."""
    skipped_texts: int
    """Texts that the tokenizer here cannot encode, or that the runtime is known to cut otherwise."""

    def __str__(self) -> str:
        end = ", then a tie" if self.greedy_tie else ""
        skipped = f" ({self.skipped_texts} left out)" if self.skipped_texts else ""
        return (
            f"{self.runtime}: largest difference of logits {self.logits_difference:.2e} (largest logit "
            f"{self.logits_scale:.3g}) over {self.compared_tokens} tokens; {self.greedy_tokens} greedy tokens "
            f"equal{end}; {self.texts} texts tokenized identically{skipped}"
        )


def prove(
    model: GPT, tokenizer: Tokenizer, runtime: Runtime, *, tolerance: float, texts: Sequence[str] = AWKWARD_TEXTS
) -> Proof:
    """Compare a model with its export.

    Args:
        model: with the weights as the export rounds them; in evaluation mode, on the CPU.
        tokenizer: the model's tokenizer.
        runtime: runtime with the export loaded.
        tolerance: largest difference of two logits that is allowed, relative to the largest logit or to 1.
        texts: texts whose tokenization is compared.

    Raises:
        UserError: they differ; names what differs most.
    """
    n_texts = _compare_tokenizers(tokenizer, runtime, texts)
    difference, scale, compared = _compare_logits(model, tokenizer, runtime, tolerance)
    n_equal, is_tie = _compare_greedy(model, tokenizer, runtime, 2 * tolerance * max(1.0, scale))
    return Proof(runtime.name, difference, scale, compared, n_equal, is_tie, n_texts, len(AWKWARD_TEXTS) - n_texts)


def build_rows(tokenizer: Tokenizer, model: GPT) -> list[list[int]]:
    """Return rows of ids to compare logits on: text that the model has not seen, and random ids."""
    length = min(model.config.block_size, MAX_COMPARED_TOKENS)
    random_ids = np.random.default_rng(0).integers(0, tokenizer.vocab_size, length).tolist()
    text = _encode_or_none(tokenizer, UNSEEN_TEXT)
    return [text[:length], random_ids] if text else [random_ids]


def _compare_tokenizers(tokenizer: Tokenizer, runtime: Runtime, texts: Sequence[str]) -> int:
    """Return the number of texts that are tokenized identically; those that cannot be encoded here do not count."""
    n_equal = 0
    for text in texts:
        expected = _encode_or_none(tokenizer, text)
        if expected is None:
            continue
        found = runtime.encode(text)
        if found != expected:
            raise UserError(
                f"the export differs: {runtime.name} tokenizes {text!r:.60} as {found[:12]} and this program as "
                f"{expected[:12]}; nothing was written"
            )
        n_equal += 1
    return n_equal


@torch.no_grad()
def _compare_logits(model: GPT, tokenizer: Tokenizer, runtime: Runtime, tolerance: float) -> tuple[float, float, int]:
    """Return the largest difference of two logits, the largest logit, and the number of tokens compared."""
    rows = build_rows(tokenizer, model)
    largest = scale = 0.0
    for ids in rows:
        expected, found = model(torch.tensor([ids]))[0].float(), runtime.compute_logits(ids)
        difference = float((expected - found).abs().max())
        scale = max(scale, float(expected.abs().max()))
        if not difference <= tolerance * max(1.0, scale):  # NaN differs, too
            token, index = divmod(int((expected - found).abs().nan_to_num(torch.inf).argmax()), expected.shape[1])
            raise UserError(
                f"the export differs: after token {token} the logit of id {index} is {found[token, index]:.6g} in "
                f"{runtime.name} and {expected[token, index]:.6g} here; nothing was written"
            )
        largest = max(largest, difference)
    return largest, scale, sum(map(len, rows))


@torch.no_grad()
def _compare_greedy(model: GPT, tokenizer: Tokenizer, runtime: Runtime, rounding: float) -> tuple[int, bool]:
    """Return the number of equal tokens, and whether the continuation ends there at a tie."""
    ids = build_rows(tokenizer, model)[0][: min(PROMPT_TOKENS, max(1, model.config.block_size // 2))]
    n_tokens = min(GREEDY_TOKENS, model.config.block_size - len(ids))
    found = runtime.continue_greedily(ids, n_tokens)
    for n_equal, token in enumerate(found):
        logits = model(torch.tensor([ids]))[0, -1, : tokenizer.vocab_size]
        expected = int(logits.argmax())
        if token != expected and logits[expected] - logits[token] <= rounding:
            return n_equal, True
        if token != expected:
            raise UserError(
                f"the export differs: greedy token {n_equal} is {token} in {runtime.name} and {expected} here; "
                "nothing was written"
            )
        ids = [*ids, token]
    return len(found), False


def _encode_or_none(tokenizer: Tokenizer, text: str) -> list[int] | None:
    """Return the ids of a text; None if the tokenizer lacks one of its characters."""
    try:
        ids = tokenizer.encode(text)
    except UserError:
        return None
    return None if tokenizer.find_unrepresented(text, ids) is not None else ids.tolist()
