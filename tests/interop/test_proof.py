"""The comparison finds what differs: here the other runtime is this program itself, with one fault."""

from collections.abc import Sequence

import pytest
import torch

from gpt.data.tokenizer import Tokenizer
from gpt.data.tokenizer_builders import build_char_tokenizer
from gpt.errors import UserError
from gpt.interop.awkward_texts import AWKWARD_TEXTS
from gpt.interop.proof import Proof, prove
from gpt.models.gpt import GPT
from tests.interop.families import make_model, make_tokenizer

MODEL, TOKENIZER = make_model("llama", block_size=96), make_tokenizer()


class SameRuntime:
    """A runtime that computes exactly what this program does."""

    name = "another program"

    def __init__(self, model: GPT = MODEL, tokenizer: Tokenizer = TOKENIZER):
        self._model, self._tokenizer = model, tokenizer

    def encode(self, text: str) -> list[int]:
        return self._tokenizer.encode(text).tolist()

    @torch.no_grad()
    def compute_logits(self, ids: Sequence[int]) -> torch.Tensor:
        return self._model(torch.tensor([list(ids)]))[0]

    def continue_greedily(self, ids: Sequence[int], n_tokens: int) -> list[int]:
        continued = list(ids)
        for _ in range(n_tokens):
            logits = self.compute_logits(continued)[-1, : self._tokenizer.vocab_size]
            continued.append(int(logits.argmax()))
        return continued[len(ids) :]


def compare(runtime: SameRuntime, model: GPT = MODEL, tokenizer: Tokenizer = TOKENIZER) -> Proof:
    return prove(model, tokenizer, runtime, tolerance=1e-4)


def test_equal_programs_are_proven_equal() -> None:
    proof = compare(SameRuntime())
    assert (proof.logits_difference, proof.greedy_tokens, proof.greedy_tie) == (0, 64, False)
    assert (proof.texts, proof.skipped_texts) == (len(AWKWARD_TEXTS), 0)
    assert proof.compared_tokens == 2 * 96


@pytest.mark.parametrize("fault", [1e-2, float("nan"), float("inf")])
def test_one_wrong_logit_is_found_and_named(fault: float) -> None:
    class Faulty(SameRuntime):
        def compute_logits(self, ids: Sequence[int]) -> torch.Tensor:
            logits = super().compute_logits(ids).clone()
            logits[70, 11] += fault
            return logits

    with pytest.raises(UserError, match=r"after token 70 the logit of id 11 is .* in another program and .* here"):
        compare(Faulty())


def test_one_wrong_greedy_token_is_found_and_named() -> None:
    class Faulty(SameRuntime):
        def continue_greedily(self, ids: Sequence[int], n_tokens: int) -> list[int]:
            tokens = super().continue_greedily(ids, n_tokens)
            tokens[63] = (tokens[63] + 1) % TOKENIZER.vocab_size
            return tokens

    with pytest.raises(UserError, match=r"greedy token 63 is \d+ in another program and \d+ here; nothing was written"):
        compare(Faulty())


def test_greedy_texts_may_part_at_a_tie() -> None:
    model = make_model("llama", block_size=96)
    with torch.no_grad():  # two tokens with the same logits, always the largest
        model.wte.weight[:] = 0.0
        model.ln_f.weight[:] = 1.0
    twin = SameRuntime(model)
    twin.continue_greedily = lambda ids, n_tokens: [5] * n_tokens  # type: ignore[method-assign]
    proof = compare(twin, model)
    assert (proof.greedy_tokens, proof.greedy_tie) == (0, True)
    assert "then a tie" in str(proof)


@pytest.mark.parametrize("index", [0, len(AWKWARD_TEXTS) - 1])
def test_one_text_that_is_tokenized_otherwise_is_found_and_named(index: int) -> None:
    class Faulty(SameRuntime):
        def encode(self, text: str) -> list[int]:
            ids = super().encode(text)
            return [*ids, 0] if text == AWKWARD_TEXTS[index] else ids

    with pytest.raises(UserError, match=r"the export differs: another program tokenizes '.*' as"):
        compare(Faulty())


def test_texts_that_the_tokenizer_lacks_characters_for_are_counted() -> None:
    tokenizer = build_char_tokenizer("Hello, world!", has_documents=True)
    model = make_model("llama", block_size=96, vocab_size=tokenizer.vocab_size)
    proof = compare(SameRuntime(model, tokenizer), model, tokenizer)
    assert proof.texts + proof.skipped_texts == len(AWKWARD_TEXTS)
    assert 1 <= proof.texts < 5
