"""Shapes of answers in OpenAI's API: completions, and conversations."""

from collections import defaultdict
from typing import Any, Protocol

from gpt.inference.generate import TokenLogprobs
from gpt.inference.text import CompletionText
from gpt.serving.engine import Update

FINISH_REASONS = {"stop": "stop", "length": "length", "context": "length"}
"""Reason here -> in OpenAI's API."""


class AnswerFormat(Protocol):
    """Shape of one answer, whole or as a stream of chunks; an object of its own for each answer."""

    id_prefix: str
    kind: str
    """Value of `object` in a whole answer."""
    chunk_kind: str
    """Value of `object` in a chunk."""

    def build_choice(self, index: int, text: CompletionText, update: Update) -> dict[str, Any]:
        """Return a choice of a whole answer."""
        ...

    def build_chunk(self, index: int, text: CompletionText, update: Update) -> dict[str, Any]:
        """Return the news of a choice in a stream."""
        ...


class CompletionFormat:
    """Answer of /v1/completions."""

    id_prefix, kind, chunk_kind = "cmpl", "text_completion", "text_completion"

    def __init__(self) -> None:
        self._text_lengths: defaultdict[int, int] = defaultdict(int)

    def build_choice(self, index: int, text: CompletionText, update: Update) -> dict[str, Any]:
        """Return a choice of a whole answer."""
        logprobs = None if text.completion.n_top_logprobs is None else self._build_logprobs(index, text, update)
        reason = _format_reason(update)
        return {"index": index, "text": update.text, "finish_reason": reason, "logprobs": logprobs}

    def build_chunk(self, index: int, text: CompletionText, update: Update) -> dict[str, Any]:
        """Return the news of a choice in a stream, which have the same shape."""
        return self.build_choice(index, text, update)

    def _build_logprobs(self, index: int, text: CompletionText, update: Update) -> dict[str, Any]:
        logprobs, offsets, length = _list_logprobs(text, update), [], self._text_lengths[index]
        for token_text in update.token_texts:
            offsets.append(length)
            length += len(token_text)
        self._text_lengths[index] = length
        return {
            "tokens": list(update.token_texts),
            "token_logprobs": [position.logprob for position in logprobs],
            "top_logprobs": [
                {text.decode_token(token): value for token, value in position.top.items()} for position in logprobs
            ],
            "text_offset": offsets,
        }


class ChatFormat:
    """Answer of /v1/chat/completions."""

    id_prefix, kind, chunk_kind = "chatcmpl", "chat.completion", "chat.completion.chunk"

    def __init__(self) -> None:
        self._begun = set[int]()

    def build_choice(self, index: int, text: CompletionText, update: Update) -> dict[str, Any]:
        """Return a choice of a whole answer."""
        return self._build(index, text, update, "message", {"role": "assistant", "content": update.text})

    def build_chunk(self, index: int, text: CompletionText, update: Update) -> dict[str, Any]:
        """Return the news of a choice in a stream; the first names the role."""
        role = {} if index in self._begun else {"role": "assistant"}
        self._begun.add(index)
        return self._build(index, text, update, "delta", role | {"content": update.text})

    def _build(
        self, index: int, text: CompletionText, update: Update, key: str, message: dict[str, str]
    ) -> dict[str, Any]:
        logprobs = None if text.completion.n_top_logprobs is None else {"content": self._build_logprobs(text, update)}
        return {"index": index, key: message, "finish_reason": _format_reason(update), "logprobs": logprobs}

    def _build_logprobs(self, text: CompletionText, update: Update) -> list[dict[str, Any]]:
        return [
            {
                "token": token_text,
                "logprob": position.logprob,
                "bytes": list(token_text.encode()),
                "top_logprobs": [
                    {"token": text.decode_token(token), "logprob": value, "bytes": None}
                    for token, value in position.top.items()
                ],
            }
            for token_text, position in zip(update.token_texts, _list_logprobs(text, update), strict=True)
        ]


def _format_reason(update: Update) -> str | None:
    return None if update.finish_reason is None else FINISH_REASONS[update.finish_reason]


def _list_logprobs(text: CompletionText, update: Update) -> list[TokenLogprobs]:
    return text.completion.logprobs[update.first_token : update.first_token + len(update.token_texts)]
