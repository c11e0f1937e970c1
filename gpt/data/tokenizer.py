"""Text <-> token ids: every kind of tokenizer is a Hugging Face tokenizer.json."""

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator
from functools import cached_property
from pathlib import Path
from typing import TypeVar

import numpy as np
import numpy.typing as npt
import tokenizers
from tokenizers import decoders

from gpt.data.byte_level import END_OF_TEXT
from gpt.data.encoders import Encoder, Ids, build_encoder
from gpt.errors import UserError
from gpt.utils.helper import first_line

END_OF_TEXT_NAMES = (END_OF_TEXT, "<|end_of_text|>", "</s>", "<eos>", "<|im_end|>")
"""Names that published tokenizers give to the token that separates documents."""

KNOWN_TIKTOKEN_COMPATIBLE = frozenset({"cec27cb89f428497695f4e2a90118d636a594654897a44c0fb11b8f185521820"})
"""SHA-256 of definitions for which tiktoken is known to do the very same merges: GPT-2's. A test checks it."""

T = TypeVar("T")


class Tokenizer:
    """A tokenizer.json and what a run needs of it."""

    def __init__(self, definition: str):
        """Load the text of a tokenizer.json; raises ValueError if it is none."""
        self.definition = definition
        try:
            self._library = tokenizers.Tokenizer.from_str(definition)
        except Exception as error:  # the library raises bare Exceptions
            raise ValueError(str(error)) from error
        self._library.encode_special_tokens = True
        self._library.no_truncation()
        self._library.no_padding()
        vocabulary = self._library.get_vocab(with_added_tokens=True)
        if not vocabulary:
            raise ValueError("its vocabulary is empty")
        self.vocab_size: int = max(vocabulary.values()) + 1
        self.end_of_text: int | None = next(
            (vocabulary[name] for name in END_OF_TEXT_NAMES if name in vocabulary), None
        )

    @classmethod
    def from_file(cls, path: Path) -> "Tokenizer":
        """Read a tokenizer.json.

        Raises:
            UserError: the file is missing or is no tokenizer.
        """
        try:
            return cls(path.read_text(encoding="utf-8"))
        except OSError as error:
            raise UserError(f"{path}: cannot be read: {error.strerror}") from error
        except ValueError as error:
            raise UserError(f"{path}: not a Hugging Face tokenizer.json: {error}") from error

    @property
    def sha256(self) -> str:
        """Digest of the definition."""
        return hashlib.sha256(self.definition.encode()).hexdigest()

    @property
    def special_ids(self) -> dict[str, int]:
        """Ids with a meaning to the pipeline, by their purpose."""
        return {} if self.end_of_text is None else {"end_of_text": self.end_of_text}

    @property
    def document_start(self) -> Ids:
        """Ids that every document begins with: end-of-text, or none if there is no such token."""
        return np.array([] if self.end_of_text is None else [self.end_of_text], dtype=np.uint32)

    def encode(self, text: str) -> Ids:
        """Return the ids of ordinary text: no special token is added, and none is recognised in the text.

        Raises:
            UserError: the text is not valid Unicode, or has a character that a character tokenizer does not know.
        """
        return _encode_or_user_error(lambda: self._encode(text))

    def encode_prompt(self, text: str) -> list[int]:
        """Return the ids of a prompt, at least one.

        An empty prompt becomes end-of-text, which begins every document, or id 0 if there is no such token.
        """
        first = 0 if self.end_of_text is None else self.end_of_text
        if self._is_byte_level:  # a prompt is short: building the fast encoder would take longer than this
            return _encode_or_user_error(lambda: self._library.encode(text, add_special_tokens=False).ids) or [first]
        return self.encode(text).tolist() or [first]

    def decode(self, ids: Iterable[int]) -> str:
        """Return the text of ids, special tokens included."""
        return self._library.decode(list(ids), skip_special_tokens=False)

    def decode_stream(self, ids: Iterable[int]) -> Iterator[str]:
        """Yield text piece by piece as ids come; a character that spans several ids waits for the last of them."""
        stream = decoders.DecodeStream(skip_special_tokens=False)
        for index in ids:
            piece = stream.step(self._library, index)
            if piece is not None:
                yield piece

    def count_bytes(self, ids: Ids) -> int:
        """Return the length in UTF-8 of the text that ids stand for."""
        if self._byte_counts is None:
            return len(self.decode(ids.tolist()).encode())
        return int(self._byte_counts[ids].sum())

    @cached_property
    def _encode(self) -> Encoder:
        # Built on first use: it takes half a second, and not everyone encodes.
        is_known = self.sha256 in KNOWN_TIKTOKEN_COMPATIBLE
        return build_encoder(json.loads(self.definition), self._library, is_known_tiktoken_compatible=is_known)

    @cached_property
    def _is_byte_level(self) -> bool:
        return (json.loads(self.definition).get("decoder") or {}).get("type") == "ByteLevel"

    @cached_property
    def _byte_counts(self) -> npt.NDArray[np.int64] | None:
        """Bytes of every token; None unless tokens consist of bytes."""
        if not self._is_byte_level:
            return None
        counts = np.zeros(self.vocab_size, dtype=np.int64)
        for token, index in self._library.get_vocab(with_added_tokens=True).items():
            counts[index] = len(token)  # a byte-level vocabulary has one character for each byte
        return counts


def _encode_or_user_error(encode: Callable[[], T]) -> T:
    """Encode a text.

    Raises:
        UserError: the text does not suit this tokenizer, or no text does: a regular expression that explodes ends the
            search after some ten million steps.
    """
    try:
        return encode()
    except UserError:
        raise
    except UnicodeEncodeError as error:
        raise UserError(f"not valid Unicode text: a lone surrogate at character {error.start}") from error
    except BaseException as error:  # the library raises bare Exceptions, and a panic in it is not even an Exception
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        raise UserError(f"the tokenizer cannot encode the text: {first_line(error)}") from error
