"""GPT-2's byte-level BPE: how text is cut into words, bytes are written as characters, and ranks imply merges."""

import itertools
from collections.abc import Iterable, Iterator

END_OF_TEXT = "<|endoftext|>"

# GPT-2's split of text into words: openai/gpt-2, encoder.py. Contractions and other signs may begin alike, letters may
# not, so letters can come first. The first four alternatives are in a group of their own, which a plain automaton
# matches, 1.5x as fast: only the look-ahead after it needs tiktoken's slower engine.
GPT2_PATTERN = r"""(?: ?\p{L}+|'(?:[sdmt]|ll|ve|re)| ?\p{N}+| ?[^\s\p{L}\p{N}]+)|\s+(?!\S)|\s+"""


def _build_byte_alphabet() -> dict[int, str]:
    """Return GPT-2's printable character for each byte: openai/gpt-2, encoder.py, bytes_to_unicode."""
    printable = [
        *range(ord("!"), ord("~") + 1),
        *range(ord("¡"), ord("¬") + 1),
        *range(ord("®"), ord("ÿ") + 1),
    ]
    others = [byte for byte in range(256) if byte not in printable]
    return {byte: chr(byte) for byte in printable} | {byte: chr(256 + index) for index, byte in enumerate(others)}


BYTE_TO_CHAR = _build_byte_alphabet()
CHAR_TO_BYTE = {char: byte for byte, char in BYTE_TO_CHAR.items()}
_TO_LATIN_1 = {ord(char): byte for char, byte in CHAR_TO_BYTE.items()}


def bytes_to_chars(token: bytes) -> str:
    """Return a token as a tokenizer.json writes it: one character for each byte."""
    return "".join(BYTE_TO_CHAR[byte] for byte in token)


def chars_to_bytes(token: str) -> bytes:
    """Return the bytes of a token that a tokenizer.json writes with one character for each."""
    return token.translate(_TO_LATIN_1).encode("latin-1")


def derive_merges(ranks: dict[bytes, int]) -> Iterator[tuple[bytes, bytes]]:
    """Yield the merge behind each token, by rank: the last pair that BPE joins if it may use lower ranks only."""
    rank_of = ranks.get
    for token, rank in sorted(ranks.items(), key=lambda item: item[1]):
        if len(token) > 1:
            parts = [token[at : at + 1] for at in range(len(token))]
            joined = [rank_of(left + right, rank) for left, right in itertools.pairwise(parts)]
            while joined[1:]:
                at = joined.index(min(joined))
                parts[at : at + 2] = [parts[at] + parts[at + 1]]
                del joined[at]
                for pair in (at - 1, at)[at == 0 : len(parts) - at]:  # the new part's neighbours
                    joined[pair] = rank_of(parts[pair] + parts[pair + 1], rank)
            yield parts[0], parts[1]


def list_all_merges(ranks: dict[bytes, int]) -> Iterator[tuple[bytes, bytes]]:
    """Yield every pair of tokens that forms a token, by its rank and theirs, as a tokenizer.json made of ranks does.

    transformers writes Llama 3's and GPT-4o's this way (convert_slow_tokenizer.py, TikTokenConverter).
    """
    for token, _ in sorted(ranks.items(), key=lambda item: item[1]):
        pairs = ((token[:at], token[at:]) for at in range(1, len(token)))
        yield from sorted(
            (pair for pair in pairs if pair[0] in ranks and pair[1] in ranks),
            key=lambda pair: (ranks[pair[0]], ranks[pair[1]]),
        )


def list_ambiguous_words(merges: Iterable[tuple[bytes, bytes]]) -> Iterator[bytes]:
    """Yield words x y z in which one token is both x y and y z, so that its place depends on the order of merges."""
    pairs = set(merges)
    for x, y in sorted(pairs):
        z = (x + y)[len(y) :]
        if (x + y).startswith(y) and (y, z) in pairs:
            yield x + y + z
