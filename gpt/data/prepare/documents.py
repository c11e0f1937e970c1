"""What a corpus consists of: documents of text, or of tokens that somebody else made."""

from dataclasses import dataclass
from functools import cached_property

import numpy as np

from gpt.data.encoders import Ids
from gpt.data.shards import Tokens
from gpt.data.tokenizer import Tokenizer


@dataclass(frozen=True)
class TextDocument:
    """One text; `name` is its path inside the source, with the place in a file that holds many."""

    name: str
    text: str

    @cached_property
    def size(self) -> int:
        """Length as UTF-8."""
        return len(self.text) if self.text.isascii() else len(self.text.encode())

    @property
    def content(self) -> bytes:
        """What makes two documents equal."""
        return self.text.encode()

    def split_tail(self, fraction: float) -> tuple["TextDocument", "TextDocument"]:
        """The document without its tail, and the tail: `fraction` of its characters."""
        cut = int(len(self.text) * (1 - fraction))
        return TextDocument(self.name, self.text[:cut]), TextDocument(self.name, self.text[cut:])

    def encode(self, tokenizer: Tokenizer) -> tuple[Ids, int]:
        """Ids, and the length of the text as UTF-8."""
        return tokenizer.encode(self.text), self.size


@dataclass(frozen=True, eq=False)
class TokenDocument:
    """The tokens of one text, without an end-of-text token before or after them."""

    name: str
    tokens: Tokens

    @property
    def size(self) -> int:
        """Bytes of the tokens."""
        return self.tokens.nbytes

    @property
    def content(self) -> bytes:
        """What makes two documents equal."""
        return self.tokens.astype(np.int64).tobytes()

    def split_tail(self, fraction: float) -> tuple["TokenDocument", "TokenDocument"]:
        """The document without its tail, and the tail: `fraction` of its tokens."""
        cut = int(len(self.tokens) * (1 - fraction))
        return TokenDocument(self.name, self.tokens[:cut]), TokenDocument(self.name, self.tokens[cut:])

    def encode(self, tokenizer: Tokenizer) -> tuple[Ids, int]:
        """Ids, and the length as UTF-8 of the text that they stand for."""
        ids = self.tokens.astype(np.uint32)
        return ids, tokenizer.count_bytes(ids)


Document = TextDocument | TokenDocument
