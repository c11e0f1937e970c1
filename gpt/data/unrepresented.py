"""Characters for which a vocabulary has no token: they are dropped, or become the unknown token."""

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import tokenizers

from gpt.data.encoders import Ids

UTF8_BYTES = 256


@dataclass(frozen=True)
class Unrepresented:
    """Characters of a text that its ids do not stand for."""

    characters: int
    n_bytes: int
    """Their length in UTF-8."""
    first: str
    """First of them, and its place in the text."""


Finder = Callable[[str, Ids], Unrepresented | None]
"""Finds what the ids of a text do not stand for; None if they stand for all of it."""


def build_finder(definition: dict[str, Any], library: tokenizers.Tokenizer) -> Finder | None:
    """Return the function that finds characters without a token; None where the vocabulary has one for any text.

    Args:
        definition: content of the tokenizer.json from which `library` was loaded.
        library: encodes text.
    """
    finder = _build_model_finder(definition, library)
    return finder if library.normalizer is None else _NormalizerFinder(library.normalizer, finder)


def _build_model_finder(definition: dict[str, Any], library: tokenizers.Tokenizer) -> Finder | None:
    """Return the function that finds characters for which the model has no token."""
    model = definition["model"]
    if isinstance(model["vocab"], dict) and "merges" in model:
        finder = _AlphabetFinder(definition, library)
        return None if finder.is_complete else finder
    has_names = isinstance(model["vocab"], dict)
    unknown_id = model["vocab"].get(model.get("unk_token")) if has_names else model.get("unk_id")
    return None if unknown_id is None else _UnknownTokenFinder(library, unknown_id)


class _NormalizerFinder:
    """Finds the characters that a normalizer removes, and those that the model has no token for.

    Args:
        normalizer: of the tokenizer.
        find_others: finds what the model has no token for; None where it has one for any text.
    """

    def __init__(self, normalizer: tokenizers.normalizers.Normalizer, find_others: Finder | None):
        self._normalizer, self._find_others = normalizer, find_others
        self._is_removed: dict[str, bool] = {}

    def __call__(self, text: str, ids: Ids) -> Unrepresented | None:
        """Return the characters that no id stands for."""
        others = None if self._find_others is None else self._find_others(text, ids)
        counts = {character: text.count(character) for character in set(text) if self._removes(character)}
        if not counts:
            return others
        place, first = min((text.index(character), character) for character in counts)
        n_bytes = sum(len(character.encode()) * count for character, count in counts.items())
        removed = Unrepresented(sum(counts.values()), n_bytes, f"{first!r} at character {place}")
        if others is None:
            return removed
        return Unrepresented(others.characters + removed.characters, others.n_bytes + n_bytes, others.first)

    def _removes(self, character: str) -> bool:
        """Return whether the normalizer leaves nothing of a character; white space at an end may stay elsewhere."""
        if character not in self._is_removed:
            removes = not character.isspace() and not self._normalizer.normalize_str(character)
            self._is_removed[character] = removes
        return self._is_removed[character]


class _AlphabetFinder:
    """Finds the characters that BPE has no token to begin with.

    Whether a character has one is looked up once, so a text costs no more than the set of its characters.

    Args:
        definition: content of the tokenizer.json.
        library: normalizes and splits text.
    """

    def __init__(self, definition: dict[str, Any], library: tokenizers.Tokenizer):
        model = definition["model"]
        prefix, suffix = (model.get(name) or "" for name in ("continuing_subword_prefix", "end_of_word_suffix"))
        pieces = (token.removeprefix(prefix).removesuffix(suffix) for token in model["vocab"])
        self._alphabet = {token for token in (*model["vocab"], *pieces) if len(token) == 1}
        bytes_with_token = {byte for byte in range(UTF8_BYTES) if f"<0x{byte:02X}>" in model["vocab"]}
        self._fallback_bytes = bytes_with_token if model.get("byte_fallback") else set[int]()
        self._library = library
        self._is_represented: dict[str, bool] = {}
        ordinary = [token["content"] for token in definition.get("added_tokens") or () if not token["special"]]
        self._added = (
            re.compile("|".join(map(re.escape, sorted(ordinary, key=len, reverse=True)))) if ordinary else None
        )
        self._mapped_letter = self._split("a")

    @property
    def is_complete(self) -> bool:
        """True if each byte has a token, so that every text has."""
        byte_level = tokenizers.pre_tokenizers.ByteLevel.alphabet()
        is_byte_level = self._split("\u00e9").endswith("\u00c3\u00a9")  # the two bytes of e with an acute accent
        return len(self._fallback_bytes) == UTF8_BYTES or (is_byte_level and self._alphabet.issuperset(byte_level))

    def __call__(self, text: str, ids: Ids) -> Unrepresented | None:
        """Return the characters that no id stands for."""
        missing = self._find_missing(text)
        if missing and self._added is not None:  # added tokens are found before the model sees the text
            text = self._added.sub("", text)
            missing = self._find_missing(text)
        if not missing:
            return None
        normal = self._normalize(text)
        counts = {character: normal.count(character) for character in missing}
        place, first = min((normal.index(character), character) for character in missing)
        n_bytes = sum(len(character.encode()) * count for character, count in counts.items())
        return Unrepresented(sum(counts.values()), n_bytes, f"{first!r} at character {place}")

    def _find_missing(self, text: str) -> list[str]:
        return [character for character in set(self._normalize(text)) if not self._has_token(character)]

    def _has_token(self, character: str) -> bool:
        if character not in self._is_represented:
            mapped = self._split("a" + character).removeprefix(self._mapped_letter)
            self._is_represented[character] = all(
                part in self._alphabet or self._fallback_bytes.issuperset(part.encode()) for part in mapped
            )
        return self._is_represented[character]

    def _normalize(self, text: str) -> str:
        normalizer = self._library.normalizer
        return text if normalizer is None else normalizer.normalize_str(text)

    def _split(self, text: str) -> str:
        """Return a text as the model sees it; white space that separates words may be gone."""
        splitter = self._library.pre_tokenizer
        return text if splitter is None else "".join(piece for piece, _ in splitter.pre_tokenize_str(text))


class _UnknownTokenFinder:
    """Finds the characters that became the unknown token.

    Args:
        library: encodes text.
        unknown_id: id of the unknown token.
    """

    def __init__(self, library: tokenizers.Tokenizer, unknown_id: int):
        self._library, self._unknown_id = library, unknown_id

    def __call__(self, text: str, ids: Ids) -> Unrepresented | None:
        """Return the characters that the unknown token stands for."""
        if not (ids == self._unknown_id).any():
            return None
        encoding = self._library.encode(text, add_special_tokens=False)
        spans = [span for index, span in zip(encoding.ids, encoding.offsets, strict=True) if index == self._unknown_id]
        lost = "".join(text[start:stop] for start, stop in spans)
        start, stop = spans[0]
        return Unrepresented(len(lost), len(lost.encode()), f"{text[start:stop]!r} at character {start}")
