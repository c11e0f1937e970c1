"""Token ids -> text, piece by piece while the ids come."""

import itertools
import json
from collections.abc import Callable, Iterable, Iterator, Sequence

from tokenizers import decoders

REPLACEMENT = "\ufffd"
"""Character that stands for bytes that are not UTF-8, and for an unfinished character at the end."""


def decode_stream(
    decode: Callable[[list[int]], str],
    ids: Iterable[int],
    prompt: Sequence[int],
    is_deferred: Callable[[int], bool],
) -> Iterator[str]:
    """Yield text as ids come; all pieces together are `decode(prompt + ids)` without `decode(prompt)`.

    A piece is held back while the next ids can change it: an unfinished character, and bytes in a row under byte
    fallback, which become text or replacement characters together. The end of the ids releases it.

    Args:
        decode: decodes ids at once.
        ids: new ids.
        prompt: ids before them, which decide the space at the join.
        is_deferred: returns whether a token becomes text only together with the next one.
    """
    context, pending = list(prompt), list[int]()
    shown = decode(context)
    for index in ids:
        pending.append(index)
        if is_deferred(index):
            continue
        text = decode(context + pending)
        settled = text.removesuffix(REPLACEMENT)
        piece, shown = _split_new(shown, settled)
        if piece:
            yield piece
        if settled == text and shown == text and decode(pending).strip():
            # Whatever comes next joins these ids alone, so decoding all ids again is not needed.
            context, pending = pending, []
            shown = decode(context)
    piece, _ = _split_new(shown, decode(context + pending))
    if piece:
        yield piece


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
