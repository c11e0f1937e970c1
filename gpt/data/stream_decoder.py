"""Token ids -> text, piece by piece while the ids come."""

import itertools
import json
from collections.abc import Callable, Sequence

from tokenizers import decoders

REPLACEMENT = "\ufffd"
"""Character that stands for bytes that are not UTF-8, and for an unfinished character at the end."""


class StreamDecoder:
    """Text of ids that come one by one; all pieces together are `decode(prompt + ids)` without `decode(prompt)`.

    A piece is held back while the next ids can change it: an unfinished character, and bytes in a row under byte
    fallback, which become text or replacement characters together. `finish` releases it.

    Args:
        decode: decodes ids at once.
        prompt: ids before them, which decide the space at the join.
        is_deferred: returns whether a token becomes text only together with the next one.
    """

    def __init__(
        self, decode: Callable[[list[int]], str], prompt: Sequence[int], is_deferred: Callable[[int], bool]
    ) -> None:
        self._decode, self._is_deferred = decode, is_deferred
        self._context, self._pending = list(prompt), list[int]()
        self._shown = decode(self._context)

    def push(self, index: int) -> str:
        """Return the text that is settled with the next id, often none."""
        self._pending.append(index)
        if self._is_deferred(index):
            return ""
        text = self._decode(self._context + self._pending)
        settled = text.removesuffix(REPLACEMENT)
        piece, self._shown = _split_new(self._shown, settled)
        if settled == text and self._shown == text and self._decode(self._pending).strip():
            # Whatever comes next joins these ids alone, so decoding all ids again is not needed.
            self._context, self._pending = self._pending, []
            self._shown = self._decode(self._context)
        return piece

    def finish(self) -> str:
        """Return the text that was held back."""
        piece, self._shown = _split_new(self._shown, self._decode(self._context + self._pending))
        return piece


def keep_ends(decoder: decoders.Decoder) -> decoders.Decoder:
    """Return a decoder that strips nothing from the ends of texts: that loses text, and panics if there is none."""
    state = json.loads(decoder.__getstate__())
    for step in state.get("decoders", [state]):
        if step["type"] == "Strip":
            step["stop"] = 0
    changed = decoders.Fuse()
    changed.__setstate__(json.dumps(state).encode())
    return changed


def _split_new(shown: str, text: str) -> tuple[str, str]:
    """Return the part of `text` that is not shown yet, and all that is shown with it."""
    if shown.startswith(text):
        return "", shown
    if text.startswith(shown):
        return text[len(shown) :], text
    same = sum(1 for _ in itertools.takewhile(lambda pair: pair[0] == pair[1], zip(shown, text, strict=False)))
    return text[same:], text
