"""A tokenizer.json in which no text becomes a special token, whatever is typed.

The library leaves out special tokens when it looks for added tokens in a text. But most vocabularies list them among
their ordinary pieces too, and there a Unigram, WordPiece or WordLevel model finds them again.
"""

from collections.abc import Iterable
from typing import Any


def hide_special_tokens(definition: dict[str, Any]) -> dict[str, Any]:
    """Return a definition that gives the same ids to text, but never the id of a special token.

    The special tokens of the vocabulary get names that no text has, and merges that make them are left out.

    Args:
        definition: content of a tokenizer.json; returned itself where no text can become a special token.
    """
    model = definition["model"]
    special = {token["content"] for token in definition.get("added_tokens") or () if token["special"]}
    pieces = model["vocab"]
    listed = special.intersection(pieces if isinstance(pieces, dict) else (piece for piece, _ in pieces))
    merges = model.get("merges")
    if merges is not None:
        remaining = [merge for merge in merges if not listed.intersection(_list_tokens(merge))]
        if not listed or (len(remaining) == len(merges) and not model.get("ignore_merges")):
            return definition
        model = model | {"merges": remaining}
    elif not listed:
        return definition
    hidden = {name: f"\U0010ffff{index}\U0010ffff" for index, name in enumerate(sorted(listed))}
    if isinstance(pieces, dict):
        model = model | {"vocab": {hidden.get(piece, piece): index for piece, index in pieces.items()}}
    else:
        model = model | {"vocab": [[hidden.get(piece, piece), score] for piece, score in pieces]}
    if model.get("unk_token") in hidden:
        model = model | {"unk_token": hidden[model["unk_token"]]}
    added = [
        token | {"content": hidden.get(token["content"], token["content"])} for token in definition["added_tokens"]
    ]
    unused = dict.fromkeys(("post_processor", "truncation", "padding"))
    return definition | unused | {"model": model, "added_tokens": added}


def _list_tokens(merge: list[str] | str) -> Iterable[str]:
    """Return the tokens that a merge joins, and the one that it makes."""
    left, right = merge.split(" ") if isinstance(merge, str) else merge
    return left, right, left + right
