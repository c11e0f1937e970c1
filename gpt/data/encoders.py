"""Fast encoders that give exactly the ids of the Hugging Face library.

tiktoken encodes byte-level BPE several times as fast as the library, and a table encodes characters. Each is used only
where it is known, or was checked, to give the library's ids; every other tokenizer is left to the library.
"""

import sys
from collections.abc import Callable
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import tiktoken
import tokenizers
from tokenizers import normalizers

from gpt.data.byte_level import (
    CHAR_TO_BYTE,
    END_OF_TEXT,
    GPT2_PATTERN,
    chars_to_bytes,
    derive_merges,
    list_all_merges,
    list_ambiguous_words,
)
from gpt.data.word_boundaries import split_at_words
from gpt.errors import UserError

Ids = npt.NDArray[np.uint32]

ENCODE_CHUNK_CHARS = 2**18
"""Characters that tiktoken encodes in one call. The library encodes what tiktoken gives up on, and this bounds its
memory."""

NON_PLAIN_BPE_SETTINGS = (
    *("dropout", "continuing_subword_prefix", "end_of_word_suffix"),
    *("unk_token", "fuse_unk", "byte_fallback"),
)
"""Settings that change what a BPE model computes. `ignore_merges` does not: it maps a word that is a token to that
token, and so do the merges."""

PROBE_TEXT = "".join(
    [
        *map(chr, range(0x2FF)),
        *(chr(point) for point in range(0x300, 0x20000, 151) if not 0xD800 <= point < 0xE000),
        "don't I'LL we've 1234567 3.14 a1b2 \r\n\r\n \n\t\tx = y  \n   z\u3000\u00a0 end\nof\n\nit ",
        "caf\u00e9 cafe\u0301 \u05e9\u05dc\u05d5\u05dd \u4f60\u597d\uff0c \u0939\u093f ",
        "\U0001f469\u200d\U0001f4bb!!! ...?",
    ]
)
"""Text of every kind. A fast encoder is used only if it encodes this as the library does."""


class Encoder(Protocol):
    """A function from ordinary text to ids: the name of a special token in the text is text."""

    def __call__(self, text: str) -> Ids:
        """Return the ids of `text`."""
        ...


def build_encoder(
    definition: dict[str, Any], library: tokenizers.Tokenizer, *, is_known_tiktoken_compatible: bool
) -> Encoder:
    """Return the fastest encoder that gives the ids of `library`.

    Args:
        definition: content of the tokenizer.json.
        library: the same tokenizer, loaded, which finds no special token in text.
        is_known_tiktoken_compatible: skips the check of the merges, which takes half a second for GPT-2.
    """
    model, pre_tokenizer = definition["model"], definition.get("pre_tokenizer")

    def encode_by_library(text: str) -> Ids:
        return np.array(library.encode(text, add_special_tokens=False).ids, dtype=np.uint32)

    plain_bpe = (
        model.get("type") == "BPE"
        and not any(model.get(name) for name in NON_PLAIN_BPE_SETTINGS)
        and all(token["special"] for token in definition.get("added_tokens", ()))
    )
    if not plain_bpe:
        return encode_by_library
    pattern = _find_word_pattern(pre_tokenizer)
    special = {token["content"] for token in definition.get("added_tokens", ())}
    vocabulary = {token: index for token, index in model["vocab"].items() if token not in special}
    if pattern is not None:
        probe = PROBE_TEXT if is_known_tiktoken_compatible else find_probe(vocabulary, model)
        if probe is not None:
            return _build_if_exact(
                lambda: TiktokenEncoder(vocabulary, pattern, library.normalizer, encode_by_library),
                encode_by_library,
                probe,
            )
    is_characters = not model["merges"] and all(len(token) == 1 for token in model["vocab"])
    if pre_tokenizer is None and library.normalizer is None and is_characters:
        return CharEncoder(model["vocab"])
    return encode_by_library


def _build_if_exact(build: Callable[[], Encoder], reference: Encoder, probe: str) -> Encoder:
    """Return the encoder that `build` makes if it encodes `probe` as `reference` does, else `reference`.

    The regular expression of a tokenizer.json was written for another engine than tiktoken's, and need not match every
    character.
    """
    try:
        encoder = build()
    except ValueError:  # an expression that tiktoken does not understand
        return reference
    return encoder if np.array_equal(encoder(probe), reference(probe)) else reference


def _find_word_pattern(pre_tokenizer: dict[str, Any] | None) -> str | None:
    """Return the regular expression that cuts text into words before byte-level BPE; None if text is cut otherwise.

    GPT-2's tokenizer.json leaves the expression to the ByteLevel step. Later ones (Llama 3, Qwen) give their own in a
    Split step before it, which keeps the matches alone (`Removed`, as in GPT-4o's) or also what is between them; the
    latter is nothing in an expression that matches every text, which a probe shows.
    """
    match pre_tokenizer:
        case {"type": "ByteLevel", "add_prefix_space": False, "use_regex": True}:
            return GPT2_PATTERN
        case {
            "type": "Sequence",
            "pretokenizers": [
                {"type": "Split", "pattern": {"Regex": str(pattern)}, "behavior": "Isolated", "invert": False}
                | {"type": "Split", "pattern": {"Regex": str(pattern)}, "behavior": "Removed", "invert": True},
                {"type": "ByteLevel", "add_prefix_space": False, "use_regex": False},
            ],
        }:
            return pattern
    return None


def find_probe(vocabulary: dict[str, int], model: dict[str, Any]) -> str | None:
    """Return a text that tiktoken must encode as a BPE model does; None if tiktoken would not do the model's merges.

    tiktoken, which knows ranks of tokens but no merges, joins any two neighbours that form a token, lowest id first.
    The merges must be in the order of the ids, and for each token either the one by which tiktoken arrives at it, or
    all there are. With all, the two may still join in another order where a token can be formed at two places that
    overlap, so the probe has all words that consist of such places.

    Args:
        vocabulary: ordinary tokens.
        model: `model` of the tokenizer.json.
    """
    if not (vocabulary.keys() >= set(CHAR_TO_BYTE) and set().union(*vocabulary) <= set(CHAR_TO_BYTE)):
        return None
    if len(set(vocabulary.values())) < len(vocabulary):  # two tokens with one id make tiktoken panic
        return None
    ranks = {chars_to_bytes(token): rank for token, rank in vocabulary.items()}
    pairs = (merge.split(" ") if isinstance(merge, str) else merge for merge in model["merges"])
    merges = [(chars_to_bytes(left), chars_to_bytes(right)) for left, right in pairs]
    if merges == list(derive_merges(ranks)):
        return PROBE_TEXT
    # tiktoken takes a word that is a token as this token, also where no merges lead to it.
    if model.get("ignore_merges") and merges == list(list_all_merges(ranks)):
        words = (word.decode(errors="ignore") for word in list_ambiguous_words(merges))
        return "\n".join([PROBE_TEXT, *(text for word in words for text in (word, word * 3, f"a{word}a"))])
    return None


class TiktokenEncoder:
    """Byte-level BPE by tiktoken.

    Args:
        vocabulary: id of each token, written with GPT-2's characters for bytes.
        pattern: regular expression that cuts text into words.
        normalizer: applied to the text first.
        encode_by_library: encodes the texts on which tiktoken's regular expression gives up.
    """

    def __init__(
        self,
        vocabulary: dict[str, int],
        pattern: str,
        normalizer: normalizers.Normalizer | None,
        encode_by_library: Encoder,
    ):
        ranks = {chars_to_bytes(token): rank for token, rank in vocabulary.items()}
        # A special token that is never allowed: without any, tiktoken looks for one at every character, and takes 1.5x
        # as long.
        never_allowed = {END_OF_TEXT: max(ranks.values()) + 1}
        self._encoding = tiktoken.Encoding(
            "corpus", pat_str=pattern, mergeable_ranks=ranks, special_tokens=never_allowed
        )
        self._normalizer = normalizer
        self._encode_by_library = encode_by_library
        # With the pattern of another family, or a normalizer that looks at the ends of a text, cutting may change ids.
        may_cut = np.array_equal(self.encode_in_chunks(PROBE_TEXT, 1), self._encode_at_once(PROBE_TEXT))
        self._chunk_chars = ENCODE_CHUNK_CHARS if may_cut else sys.maxsize

    def __call__(self, text: str) -> Ids:
        """Return the ids of `text`."""
        if len(text) <= self._chunk_chars:
            return self._encode_at_once(text)
        return self.encode_in_chunks(text, self._chunk_chars)

    def encode_in_chunks(self, text: str, min_chars: int) -> Ids:
        """Return the ids of `text`, encoded in chunks of at least `min_chars` characters."""
        return np.concatenate([self._encode_at_once(chunk) for chunk in split_at_words(text, min_chars)])

    def _encode_at_once(self, text: str) -> Ids:
        normal = text if self._normalizer is None else self._normalizer.normalize_str(text)
        try:
            return self._encoding.encode_to_numpy(normal, disallowed_special=())
        except UnicodeEncodeError:
            raise
        except ValueError:  # its regular expression gives up on thousands of spaces in a row
            return self._encode_by_library(text)


class CharEncoder:
    """One id for each character, looked up in a table.

    Args:
        vocabulary: id of each character.
    """

    def __init__(self, vocabulary: dict[str, int]):
        self._ids = np.full(0x110000, -1, dtype=np.int64)
        for character, index in vocabulary.items():
            self._ids[ord(character)] = index

    def __call__(self, text: str) -> Ids:
        """Return the ids of `text`.

        Raises:
            UserError: a character has no id.
        """
        code_points = np.frombuffer(text.encode("utf-32-le"), dtype=np.uint32)
        ids = self._ids[code_points]
        if len(ids) and ids.min() < 0:
            unknown = text[int(ids.argmin())]
            raise UserError(
                f"the character {unknown!r} is not in the tokenizer's vocabulary, the characters of its corpus; "
                "leave it out, or prepare the corpus with --data.tokenizer byte, bpe or gpt2"
            )
        return ids.astype(np.uint32)
