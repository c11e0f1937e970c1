"""Text of a completion while its tokens come: characters are never cut, and it ends before a stop text."""

from collections.abc import Sequence

from gpt.data.tokenizer import Tokenizer
from gpt.inference.generate import Completion


class CompletionText:
    """Text of a completion, piece by piece.

    A piece is held back while the next tokens can change it or make a stop text of it.

    Args:
        completion: the completion; a stop text in it ends it.
        tokenizer: decodes its tokens.
        joined_to: prompt that it continues in one document; none after a prompt that only begins a document.
    """

    def __init__(self, completion: Completion, tokenizer: Tokenizer, joined_to: Sequence[int] = ()):
        self.completion, self._stop = completion, completion.config.stop
        self._tokenizer = tokenizer
        self._decoder = tokenizer.build_stream_decoder(joined_to)
        self.token_texts = list[str]()
        """Text that each token settles; a character of several tokens belongs to the last of them."""
        self._held = ""

    def read(self) -> str:
        """Return the text that is settled since the last call; all of the rest once the completion has ended."""
        text = self._held
        for token in self.completion.tokens[len(self.token_texts) :]:
            self.token_texts.append(self._decoder.push(token))
            text += self.token_texts[-1]
        if self.completion.finish_reason is not None:
            text += self._decoder.finish()
        end = min((at for at in map(text.find, self._stop) if at >= 0), default=-1)
        if end >= 0:
            self.completion.finish_reason, self._held = "stop", ""
            return text[:end]
        n_held = 0 if self.completion.finish_reason else _count_held(text, self._stop)
        text, self._held = text[: len(text) - n_held], text[len(text) - n_held :]
        return text

    def decode_token(self, token: int) -> str:
        """Return the text of a token by itself."""
        return self._tokenizer.decode([token])


def _count_held(text: str, stop: Sequence[str]) -> int:
    """Return the length of the longest end of a text that may begin a stop text."""
    longest = max(map(len, stop), default=0)
    return next((n for n in range(min(longest - 1, len(text)), 0, -1) if any(s.startswith(text[-n:]) for s in stop)), 0)
