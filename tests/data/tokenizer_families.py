"""Tokenizers of every family that a tokenizer.json may hold, made small."""

from collections.abc import Callable, Sequence

from tokenizers import (
    AddedToken,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
)

from gpt.data.byte_level import BYTE_TO_CHAR

LETTERS = "abcdefghijklmnopqrstuvwxyz"
WORDS = ("the", "model", "one", "two", "three")


def add_tokens(library: Tokenizer, special: Sequence[str], ordinary: Sequence[str] = ()) -> Tokenizer:
    """Add special and ordinary tokens to a tokenizer."""
    library.add_special_tokens([AddedToken(name, special=True, normalized=False) for name in special])
    library.add_tokens([AddedToken(name, special=False, normalized=False) for name in ordinary])
    return library


def build_byte_level() -> Tokenizer:
    """Return byte-level BPE, as in GPT-2 and Qwen, that lists its special token among the others."""
    vocabulary = {char: byte for byte, char in BYTE_TO_CHAR.items()} | {"th": 256, "the": 257, "</s>": 258}
    library = Tokenizer(models.BPE(vocabulary, [("t", "h"), ("th", "e")], ignore_merges=True))
    library.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    library.decoder = decoders.ByteLevel()
    return library


def build_byte_fallback() -> Tokenizer:
    """Return BPE with byte fallback, as in Llama 2 and Gemma."""
    vocabulary = {"<unk>": 0, "<s>": 1, "</s>": 2} | {f"<0x{byte:02X}>": 3 + byte for byte in range(256)}
    for piece in ("▁", *LETTERS, "th", "the", "▁the"):
        vocabulary[piece] = len(vocabulary)
    merges = [("t", "h"), ("th", "e"), ("▁", "the")]
    library = Tokenizer(models.BPE(vocabulary, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    library.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    library.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return library


def build_unigram() -> Tokenizer:
    """Return Unigram, as in T5."""
    pieces = ["<unk>", "<s>", "</s>", "▁", *LETTERS, *"<>/|[]_0123456789", *(f"▁{word}" for word in WORDS)]
    library = Tokenizer(models.Unigram([(piece, 0.0 if index < 3 else -2.0) for index, piece in enumerate(pieces)], 0))
    library.pre_tokenizer = pre_tokenizers.Metaspace()
    library.decoder = decoders.Metaspace()
    return library


def build_word_piece() -> Tokenizer:
    """Return WordPiece, as in BERT, with words cut at spaces alone."""
    pieces = ["[UNK]", "</s>", *WORDS, *LETTERS, *(f"##{letter}" for letter in LETTERS), ".", "##."]
    library = Tokenizer(models.WordPiece({piece: i for i, piece in enumerate(pieces)}, unk_token="[UNK]"))
    library.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    library.decoder = decoders.WordPiece()
    return library


def build_word_level() -> Tokenizer:
    """Return whole words, joined by spaces."""
    library = Tokenizer(
        models.WordLevel({word: i for i, word in enumerate(["[UNK]", "</s>", *WORDS])}, unk_token="[UNK]")
    )
    library.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return library


def build_suffix_bpe() -> Tokenizer:
    """Return BPE that marks the ends of words, as in the first GPT and CLIP."""
    pieces = ["<unk>", "</s>", *LETTERS, *(f"{letter}</w>" for letter in LETTERS)]
    library = Tokenizer(
        models.BPE({p: i for i, p in enumerate(pieces)}, [], unk_token="<unk>", end_of_word_suffix="</w>")
    )
    library.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    library.decoder = decoders.BPEDecoder()
    return library


FAMILIES: dict[str, Callable[[], Tokenizer]] = {
    "byte-level BPE": build_byte_level,
    "BPE with byte fallback": build_byte_fallback,
    "Unigram": build_unigram,
    "WordPiece": build_word_piece,
    "WordLevel": build_word_level,
    "BPE with suffixes": build_suffix_bpe,
}
