"""Positions at which a text may be cut without changing its tokens.

GPT-2's pattern and its descendants always end a word at two kinds of position:

1. before a space that follows a printable ASCII character;
2. before the first character of a line, unless that character may be white space, or the line before ends with what may
   be white space. (Of several white characters the last is a word by itself if a word follows, so a newline after a
   space is no safe place.)

BPE merges never cross a word's end, so the tokens of a text that is cut there are the tokens of its parts, one part
after the other. The two patterns below find the same positions, in `str` and in UTF-8. A test compares them.
"""

import re
from collections.abc import Iterator

WORD_BOUNDARY_IN_TEXT = re.compile(
    "(?<=[!-~])(?= )"  # 1
    "|(?<=[!-~\u00c0-\u0fff\u3001-\U0010ffff]\n)(?=[!-~\u00c0-\u0fff\u4000-\U0010ffff])"  # 2
)

WORD_BOUNDARY_IN_UTF8 = re.compile(
    rb"(?<=[!-~])(?= )"  # 1
    # 2: a look-behind has a fixed width, so there is one for each length of the last character before the newline.
    rb"|(?:(?<=[!-~]\n)|(?<=[\xc3-\xdf][\x80-\xbf]\n)|(?<=[\xe0\xe4-\xef][\x80-\xbf][\x80-\xbf]\n)"
    rb"|(?<=\xe3[\x81-\xbf][\x80-\xbf]\n)|(?<=\xe3\x80[\x81-\xbf]\n)"
    rb"|(?<=[\xf0-\xf4][\x80-\xbf][\x80-\xbf][\x80-\xbf]\n))(?=[!-~\xc3-\xe0\xe4-\xf4])"
)

LOOKBEHIND_BYTES = 5
"""Bytes before a position that WORD_BOUNDARY_IN_UTF8 looks at."""


def split_at_words(text: str, min_chars: int) -> Iterator[str]:
    """Split a text at word boundaries into pieces of at least `min_chars` characters, except for the last."""
    start = 0
    while start < len(text):
        boundary = WORD_BOUNDARY_IN_TEXT.search(text, start + min_chars)
        stop = boundary.start() if boundary else len(text)
        yield text[start:stop]
        start = stop
