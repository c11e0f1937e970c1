"""JSON objects that end with their own digest, so that every changed byte is noticed.

{
  "format_version": 3,
  ...
  "sha256": "SHA-256 of the text up to the comma before this key"
}
"""

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from gpt.errors import UserError
from gpt.utils.atomic_io import parse_json_object, write_text

SEAL_KEY = "sha256"

_SEAL = f',\n  "{SEAL_KEY}": "'


class SealError(ValueError):
    """A digest that is not the one of the text that it seals."""


def seal_json(content: Mapping[str, Any]) -> str:
    """Return a non-empty object as sealed JSON text."""
    text = json.dumps(content, indent=2).removesuffix("\n}")
    return f'{text}{_SEAL}{_sha256(text)}"\n}}\n'


def write_sealed_json(path: Path, content: Mapping[str, Any]) -> None:
    """Replace `path` by `content` as sealed JSON in one step."""
    write_text(path, seal_json(content))


def verify_seal(text: str, content: Mapping[str, Any]) -> None:
    """Compare the digest in a sealed text with the text before it.

    Args:
        text: sealed JSON.
        content: `text` when it is parsed.

    Raises:
        SealError: the digests differ (the message names both), or the text does not end with the digest.
    """
    sealed, _, end = text.rpartition(_SEAL)
    found, expected = _sha256(sealed), content.get(SEAL_KEY)
    if found != expected:
        raise SealError(f"SHA-256 {found} instead of {expected!r:.80}")
    if end != f'{found}"\n}}\n':
        raise SealError("it does not end with its digest")


def read_sealed_json(path: Path, *, format_version: int, remedy: str) -> dict[str, Any]:
    """Return the object in a sealed file, its digest included.

    Args:
        path: the file.
        format_version: the only version that the file may have under `format_version`.
        remedy: the end of each error message.

    Raises:
        UserError: the file cannot be read, is of another format, or was changed.
        FileNotFoundError: there is no such file.
    """
    try:
        text = path.read_text(encoding="utf-8")
        content = parse_json_object(text)
        found = content.get("format_version")
        if found != format_version:
            raise UserError(f"{path}: format {found!r:.40}, but this version reads format {format_version}; {remedy}")
        verify_seal(text, content)
    except FileNotFoundError:
        raise
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}") from error
    except ValueError as error:
        raise UserError(f"{path}: damaged: {error}; {remedy}") from error
    return content


def _sha256(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()
