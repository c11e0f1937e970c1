"""Documents of text, or of tokens that another program made."""

from dataclasses import dataclass
from functools import cached_property

import numpy as np

from gpt.data.encoders import Ids
from gpt.data.shards import Tokens
from gpt.data.tokenizer import Tokenizer
from gpt.data.unrepresented import Unrepresented


@dataclass(frozen=True)
class TextDocument:
    """A text. Its name is the path inside the source, with the position in a file that holds many."""

    name: str
    text: str

    @cached_property
    def size(self) -> int:
        """Length in UTF-8."""
        return len(self.text) if self.text.isascii() else len(self.text.encode())

    @property
    def content(self) -> bytes:
        """Bytes that are compared to find duplicates."""
        return self.text.encode()

    def split_tail(self, fraction: float) -> tuple["TextDocument", "TextDocument"]:
        """Split into the document without its tail, and the tail: `fraction` of the characters."""
        cut = int(len(self.text) * (1 - fraction))
        return TextDocument(self.name, self.text[:cut]), TextDocument(self.name, self.text[cut:])

    def encode(self, tokenizer: Tokenizer) -> tuple[Ids, int, Unrepresented | None]:
        """Return the ids, the length in UTF-8 of the text that they stand for, and what they do not stand for."""
        ids = tokenizer.encode(self.text)
        lost = tokenizer.find_unrepresented(self.text, ids)
        return ids, self.size if lost is None else max(0, self.size - lost.n_bytes), lost


@dataclass(frozen=True, eq=False)
class TokenDocument:
    """The tokens of a text, without an end-of-text token before or after them."""

    name: str
    tokens: Tokens

    @property
    def size(self) -> int:
        """Bytes of the tokens."""
        return self.tokens.nbytes

    @property
    def content(self) -> bytes:
        """Bytes that are compared to find duplicates."""
        return self.tokens.astype(np.int64).tobytes()

    def split_tail(self, fraction: float) -> tuple["TokenDocument", "TokenDocument"]:
        """Split into the document without its tail, and the tail: `fraction` of the tokens."""
        cut = int(len(self.tokens) * (1 - fraction))
        return TokenDocument(self.name, self.tokens[:cut]), TokenDocument(self.name, self.tokens[cut:])

    def encode(self, tokenizer: Tokenizer) -> tuple[Ids, int, Unrepresented | None]:
        """Return the ids, the length in UTF-8 of the text that they stand for, and what they do not stand for."""
        ids = self.tokens.astype(np.uint32)
        return ids, tokenizer.count_bytes(ids), None


Document = TextDocument | TokenDocument
