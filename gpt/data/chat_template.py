"""The chat template of a tokenizer: its source and special tokens, in the files that Hugging Face's folders have.

    chat_template.jinja, or the key chat_template of tokenizer_config.json
    special_tokens_map.json, or the keys of tokenizer_config.json: bos_token, eos_token, ...

`gpt.inference.chat` renders it.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gpt.data.end_of_text import TOKENIZER_SETTINGS_FILE
from gpt.errors import UserError
from gpt.utils.atomic_io import read_json, write_json, write_text

CHAT_TEMPLATE_FILE = "chat_template.jinja"
SPECIAL_TOKENS_FILE = "special_tokens_map.json"
TEMPLATE_KEY = "chat_template"
DEFAULT_NAME = "default"
"""Name of the template to use where a folder has several, for tools and others."""


@dataclass(frozen=True)
class ChatTemplate:
    """Jinja source that makes one text of a conversation."""

    source: str
    special_tokens: Mapping[str, str]
    """Names of special tokens that the source may use: bos_token, eos_token, ..."""

    def save(self, folder: Path) -> None:
        """Write the source and the names of the special tokens into a folder."""
        write_json(folder / SPECIAL_TOKENS_FILE, dict(self.special_tokens))
        write_text(folder / CHAT_TEMPLATE_FILE, self.source)


def find_chat_template(folder: Path) -> ChatTemplate | None:
    """Return the chat template of the tokenizer in a folder; None if it has none.

    Raises:
        UserError: a file cannot be read, or its template is no text.
    """
    settings = _read_if_present(folder / TOKENIZER_SETTINGS_FILE)
    source = _read_source(folder, settings)
    if source is None:
        return None
    names = settings | _read_if_present(folder / SPECIAL_TOKENS_FILE)
    tokens = {key: _read_name(value) for key, value in names.items() if key.endswith("_token")}
    return ChatTemplate(source, {key: name for key, name in tokens.items() if name is not None})


def _read_source(folder: Path, settings: dict[str, Any]) -> str | None:
    file = folder / CHAT_TEMPLATE_FILE
    if file.is_file():
        try:
            return file.read_bytes().decode()
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"{file}: cannot be read: {error}; mend or remove it") from error
    source = settings.get(TEMPLATE_KEY)
    if isinstance(source, list):
        named = {item.get("name"): item.get("template") for item in source if isinstance(item, dict)}
        source = named.get(DEFAULT_NAME)
    if source is not None and not isinstance(source, str):
        place = folder / TOKENIZER_SETTINGS_FILE
        raise UserError(f"{place}: {TEMPLATE_KEY} {json.dumps(source)[:80]} is not a text; mend or remove it")
    return source


def _read_if_present(path: Path) -> dict[str, Any]:
    return read_json(path) if path.is_file() else {}


def _read_name(value: Any) -> str | None:
    """Return the name of a special token, which is a string or the `content` of an object; None for anything else."""
    name = value.get("content") if isinstance(value, dict) else value
    return name if isinstance(name, str) else None
