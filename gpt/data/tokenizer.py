"""Text <-> token ids: every kind of tokenizer is a Hugging Face tokenizer.json."""

import hashlib
import json
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import TypeVar

import numpy as np
import numpy.typing as npt
import tokenizers

from gpt.data.byte_level import CHAR_TO_BYTE
from gpt.data.encoders import Encoder, Ids, build_encoder
from gpt.data.end_of_text import (
    TOKENIZER_SETTINGS_FILE,
    EndOfTextRule,
    Vocabulary,
    describe_settings,
    find_by_name,
    find_closing_token,
    find_first_known_name,
    find_recorded_rule,
)
from gpt.data.special_tokens import hide_special_tokens
from gpt.data.stream_decoder import StreamDecoder, keep_ends
from gpt.data.tokenizer_files import explain_unreadable_file, find_renumbered_token
from gpt.data.unrepresented import Finder, Unrepresented, build_finder
from gpt.errors import UserError
from gpt.utils.atomic_io import write_json, write_text
from gpt.utils.helper import first_line

TOKENIZER_FILE = "tokenizer.json"

KNOWN_TIKTOKEN_COMPATIBLE = frozenset({"cec27cb89f428497695f4e2a90118d636a594654897a44c0fb11b8f185521820"})
"""SHA-256 of definitions for which tiktoken is known to do the very same merges: GPT-2's. A test checks it."""

BYTE_FALLBACK_NAME = re.compile("<0x[0-9A-Fa-f]{2}>")
"""Name of a token that stands for a byte."""

T = TypeVar("T")


class Tokenizer:
    """A tokenizer.json and what a run needs of it."""

    def __init__(self, definition: str, end_of_text_rule: EndOfTextRule = find_by_name):
        """Load a tokenizer.json.

        Args:
            definition: text of the file.
            end_of_text_rule: chooses the token that separates documents.

        Raises:
            ValueError: the text is no tokenizer.json, or the rule finds no token where it must.
        """
        self.definition = definition
        try:
            self._library = _load_library(definition)
        except Exception as error:  # the library raises bare Exceptions
            raise ValueError(str(error)) from error
        ids = self._library.get_vocab(with_added_tokens=True)
        if not ids:
            raise ValueError("its vocabulary is empty")
        self.vocab_size: int = max(ids.values()) + 1
        added = sorted(self._library.get_added_tokens_decoder().items())
        processor = self._library.post_processor
        self._vocabulary = Vocabulary(
            ids=ids,
            special=tuple(token.content for _, token in added if token.special),
            closing=None if processor is None else find_closing_token(processor.__getstate__()),
            is_text=self._may_be_text,
        )
        self.end_of_text: int | None = self.find_end_of_text(end_of_text_rule)

    @classmethod
    def from_file(cls, path: Path, end_of_text_rule: EndOfTextRule = find_by_name) -> "Tokenizer":
        """Read a tokenizer.json.

        Raises:
            UserError: the file is missing or is no tokenizer.
        """
        try:
            return cls(path.read_text(encoding="utf-8-sig"), end_of_text_rule)
        except OSError as error:
            raise UserError(f"{path}: cannot be read: {error.strerror}") from error
        except ValueError as error:
            reason = explain_unreadable_file(path, error)
            raise UserError(f"{path}: not a Hugging Face tokenizer.json: {reason}") from error

    @classmethod
    def from_folder(cls, folder: Path) -> "Tokenizer":
        """Read what `save` wrote.

        Raises:
            UserError: the file is missing or is no tokenizer.
        """
        return cls.from_file(folder / TOKENIZER_FILE, find_recorded_rule(folder))

    def save(self, folder: Path) -> None:
        """Write tokenizer.json, and tokenizer_config.json where the name alone does not give the end-of-text token."""
        if self.end_of_text != find_first_known_name(self._vocabulary):
            name = None if self.end_of_text is None else self.name_token(self.end_of_text)
            write_json(folder / TOKENIZER_SETTINGS_FILE, describe_settings(name))
        else:
            (folder / TOKENIZER_SETTINGS_FILE).unlink(missing_ok=True)
        write_text(folder / TOKENIZER_FILE, self.definition)

    @property
    def sha256(self) -> str:
        """Digest of the definition."""
        return hashlib.sha256(self.definition.encode()).hexdigest()

    @property
    def special_ids(self) -> dict[str, int]:
        """Ids with a meaning to the pipeline, by their purpose."""
        return {} if self.end_of_text is None else {"end_of_text": self.end_of_text}

    @property
    def special_names(self) -> tuple[str, ...]:
        """Names of the special tokens."""
        return self._vocabulary.special

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

    def encode_special(self, text: str) -> Ids:
        """Return the ids of a text in which the names of special tokens stand for these; none is added.

        Raises:
            UserError: as for `encode`.
        """
        _encode_or_user_error(text.encode)
        ids = _encode_or_user_error(lambda: self._control_library.encode(text, add_special_tokens=False).ids)
        return np.array(ids, dtype=np.uint32)

    def encode_prompt(self, text: str) -> list[int]:
        """Return the ids of a prompt, at least one.

        An empty prompt becomes end-of-text, which begins every document, or id 0 if there is no such token.
        """
        first = 0 if self.end_of_text is None else self.end_of_text
        _encode_or_user_error(text.encode)  # the library's own error does not name a lone surrogate
        if self._is_byte_level:  # a prompt is short: building the fast encoder would take longer than this
            return _encode_or_user_error(lambda: self._text_library.encode(text, add_special_tokens=False).ids) or [
                first
            ]
        return self.encode(text).tolist() or [first]

    def decode(self, ids: Iterable[int]) -> str:
        """Return the text of ids, special tokens included."""
        return self._library.decode(list(ids), skip_special_tokens=False)

    def decode_stream(self, ids: Iterable[int], prompt: Sequence[int] = ()) -> Iterator[str]:
        """Yield the text of new ids piece by piece as they come, as it stands after the text of a prompt.

        All pieces together are the text of prompt and ids without that of the prompt.

        Args:
            ids: new ids.
            prompt: ids of the same document before them.
        """
        decoder = self.build_stream_decoder(prompt)
        yield from filter(None, map(decoder.push, ids))
        yield from filter(None, [decoder.finish()])

    def build_stream_decoder(self, prompt: Sequence[int] = ()) -> StreamDecoder:
        """Return a decoder of new ids after a prompt; `decode_stream` is its loop."""
        return StreamDecoder(self.decode, prompt, self._is_deferred)

    def find_renumbered_token(self) -> str | None:
        """Return what the library changes in the ids of added tokens; None if it keeps them."""
        return find_renumbered_token(self.definition, self._library)

    def find_end_of_text(self, rule: EndOfTextRule) -> int | None:
        """Return the id of the token that a rule chooses to separate documents."""
        return rule(self._vocabulary)

    def name_token(self, index: int) -> str | None:
        """Return the name of a token; None if there is none of this id."""
        return self._library.id_to_token(index)

    def find_unrepresented(self, text: str, ids: Ids) -> Unrepresented | None:
        """Return the characters of a text that its ids do not stand for; None if there are none."""
        return None if self._unrepresented_finder is None else self._unrepresented_finder(text, ids)

    def count_bytes(self, ids: Ids) -> int:
        """Return the length in UTF-8 of the text that ids stand for."""
        if self._byte_counts is None:
            return len(self.decode(ids.tolist()).encode())
        return int(self._byte_counts[ids].sum())

    @cached_property
    def _encode(self) -> Encoder:
        # Built on first use: it takes half a second, and not everyone encodes.
        is_known = self.sha256 in KNOWN_TIKTOKEN_COMPATIBLE
        return build_encoder(json.loads(self.definition), self._text_library, is_known_tiktoken_compatible=is_known)

    @cached_property
    def _text_library(self) -> tokenizers.Tokenizer:
        """The library's tokenizer for text, which never becomes a special token."""
        definition = json.loads(self.definition)
        hidden = hide_special_tokens(definition)
        return self._library if hidden is definition else _load_library(json.dumps(hidden))

    @cached_property
    def _control_library(self) -> tokenizers.Tokenizer:
        """The library's tokenizer for text that names special tokens."""
        library = _load_library(self.definition)
        library.encode_special_tokens = False
        return library

    @cached_property
    def _unrepresented_finder(self) -> Finder | None:
        return build_finder(json.loads(self.definition), self._text_library)

    def _may_be_text(self, name: str) -> bool:
        """Return whether the library finds the token of this name in ordinary text."""
        index = self._library.token_to_id(name)
        return any(index in self._encode_if_possible(text) for text in (name, f" {name} ", f"a{name}a", f"a {name} a"))

    def _encode_if_possible(self, text: str) -> list[int]:
        """Return the library's ids of a text; none if the vocabulary cannot encode it."""
        try:
            return _encode_or_user_error(lambda: self._text_library.encode(text, add_special_tokens=False).ids)
        except UserError:
            return []

    @cached_property
    def _byte_fallback_ids(self) -> frozenset[int]:
        """Ids of single bytes, where the decoder makes text of bytes in a row."""
        if "ByteFallback" not in json.dumps(json.loads(self.definition).get("decoder")):
            return frozenset()
        return frozenset(index for name, index in self._vocabulary.ids.items() if BYTE_FALLBACK_NAME.fullmatch(name))

    def _is_deferred(self, index: int) -> bool:
        """Return whether an id becomes text only together with the next one: a byte, or an id without a token."""
        return index in self._byte_fallback_ids or self._library.id_to_token(index) is None

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
            is_bytes = CHAR_TO_BYTE.keys() >= set(token)  # one character for each byte; not so in some added tokens
            counts[index] = len(token) if is_bytes else len(token.encode())
        return counts


def _load_library(definition: str) -> tokenizers.Tokenizer:
    library = tokenizers.Tokenizer.from_str(definition)
    library.encode_special_tokens = True
    library.no_truncation()
    library.no_padding()
    if library.decoder is not None and b'"Strip"' in library.decoder.__getstate__():
        library.decoder = keep_ends(library.decoder)
    return library


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
        raise UserError(
            f"the tokenizer cannot encode the text: {first_line(error)}; use another one, such as bpe or gpt2"
        ) from error
