"""The token that separates documents: named by the user, by a tokenizer_config.json, or found by its name."""

import json
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gpt.data.byte_level import END_OF_TEXT

TOKENIZER_SETTINGS_FILE = "tokenizer_config.json"
"""File beside a tokenizer.json that names its end-of-text token, as in Hugging Face repositories."""

END_OF_TURN = "<|im_end|>"
"""Name of ChatML's token after each turn of a conversation, which separates documents where no token ends a text."""
KNOWN_NAMES = (END_OF_TEXT, "<|end_of_text|>", "</s>", "<eos>", END_OF_TURN)
"""Names that published tokenizers give to the token that separates documents."""

_TEXT = r"(text|txt|doc|document|sentence|sequence|seq|string|str|file|stream|passage|article)"
NAME_PATTERNS = tuple(
    re.compile(pattern)
    for pattern in (
        rf"/s|/{_TEXT}|eos(_?(token|id))?|eod|eof|end_?(of_?)?{_TEXT}",
        rf"(.*_)?(eos|end_?of_?{_TEXT})(_.*)?",
        r"im_end",
        r"sep(arator)?(_?token)?|doc(ument)?(_?(sep|separator|boundary|break))?",
        rf"s|bos(_?(token|id))?|(begin|beginning|start)_?(of_?)?{_TEXT}",
        r"end|eot",
    )
)
"""Patterns of other names, best first: of the letters and slashes in lower case, with _ for all between them."""


@dataclass(frozen=True)
class Vocabulary:
    """Names of a tokenizer's tokens."""

    ids: Mapping[str, int]
    """Id of every token, added ones included."""
    special: tuple[str, ...]
    """Special added tokens, by id."""
    closing: str | None
    """Token that the library would put after every text, if asked to."""
    is_text: Callable[[str], bool]
    """Returns whether ordinary text may contain the token of this name."""


EndOfTextRule = Callable[[Vocabulary], int | None]
"""Chooses the id of the end-of-text token; None if there is none."""


def find_by_name(vocabulary: Vocabulary) -> int | None:
    """Return the id of the token that separates documents, judged by its name.

    Special tokens come first. A token that ordinary text may contain never separates documents.
    """
    for name in _order_by_name(vocabulary.special):
        return vocabulary.ids[name]
    if vocabulary.closing in vocabulary.special:
        return vocabulary.ids[vocabulary.closing]
    for name in KNOWN_NAMES:  # a vocabulary may list it without adding it as a special token
        if name in vocabulary.ids and not vocabulary.is_text(name):
            return vocabulary.ids[name]
    return None


def find_closing_token(post_processor: str) -> str | None:
    """Return the token that a post-processor puts after every text; None if there is none.

    Args:
        post_processor: JSON of this part of a tokenizer.json.
    """
    content = json.loads(post_processor) or {}
    for step in content.get("processors", [content]):
        if step.get("type") == "TemplateProcessing" and "SpecialToken" in step["single"][-1]:
            return str(step["single"][-1]["SpecialToken"]["id"])
    return None


def require_name(name: str) -> EndOfTextRule:
    """Return the rule that takes the token of this name.

    The rule raises ValueError if there is no such token, or if ordinary text may contain it.
    """

    def find(vocabulary: Vocabulary) -> int | None:
        special = ", ".join(vocabulary.special[:10]) or "none"
        if name not in vocabulary.ids:
            raise ValueError(f"no token of this name in the tokenizer; its special tokens: {special}")
        if name not in vocabulary.special and vocabulary.is_text(name):
            raise ValueError(f"ordinary text may contain this token; name a special one: {special}")
        return vocabulary.ids[name]

    return find


def prefer_name(name: str) -> EndOfTextRule:
    """Return the rule that takes the token of this name if it can separate documents, else finds one by name."""

    def find(vocabulary: Vocabulary) -> int | None:
        try:
            return require_name(name)(vocabulary)
        except ValueError:
            return find_by_name(vocabulary)

    return find


def take_id(index: int | None) -> EndOfTextRule:
    """Return the rule that takes this id, which a prepared corpus has recorded."""
    return lambda vocabulary: index


def find_first_known_name(vocabulary: Vocabulary) -> int | None:
    """Return the id that was chosen when ordinary tokens counted too; folders of that time record no name."""
    return next((vocabulary.ids[name] for name in KNOWN_NAMES if name in vocabulary.ids), None)


def find_rule_beside(path: Path) -> EndOfTextRule:
    """Return the rule for a user's tokenizer.json: the eos_token of a tokenizer_config.json beside it comes first."""
    name = _read_settings(path.with_name(TOKENIZER_SETTINGS_FILE)).get("eos_token")
    return prefer_name(name) if name is not None else find_by_name


def find_recorded_rule(folder: Path) -> EndOfTextRule:
    """Return the rule for a tokenizer.json that this program saved in `folder`."""
    settings = _read_settings(folder / TOKENIZER_SETTINGS_FILE)
    if "eos_token" not in settings:
        return find_first_known_name
    name = settings["eos_token"]
    return lambda vocabulary: None if name is None else vocabulary.ids.get(name)


def describe_settings(name: str | None) -> dict[str, Any]:
    """Return the content of a tokenizer_config.json that records the end-of-text token."""
    return {"eos_token": name, "tokenizer_class": "PreTrainedTokenizerFast"}


def _order_by_name(names: tuple[str, ...]) -> Iterator[str]:
    """Yield the names that may say end of text, best first."""
    yield from (known for known in KNOWN_NAMES if known in names and known != END_OF_TURN)
    words = {name: re.sub("[^a-z/]+", "_", name.casefold()).strip("_") for name in names}
    for pattern in NAME_PATTERNS:
        yield from (name for name in names if pattern.fullmatch(words[name]))


def _read_settings(path: Path) -> dict[str, Any]:
    """Return the settings in a tokenizer_config.json, with the eos_token as a string; empty if there are none."""
    try:
        content = json.loads(path.read_text(encoding="utf-8-sig"))
    except (OSError, ValueError):
        return {}
    if not isinstance(content, dict):
        return {}
    token = content.get("eos_token")
    return content | {"eos_token": token.get("content")} if isinstance(token, dict) else content
