import random
from collections.abc import Callable
from itertools import takewhile

import pytest
from tokenizers import decoders

from gpt.data.tokenizer import Tokenizer
from gpt.data.tokenizer_builders import build_byte_tokenizer, build_char_tokenizer
from tests.data.tokenizer_families import FAMILIES, add_tokens, build_byte_fallback

DECODERS = {
    "Metaspace that never prepends": decoders.Metaspace(prepend_scheme="never"),
    "Strip at both ends": decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 1)]
    ),
    "CTC": decoders.CTC(),
    "ByteFallback": decoders.ByteFallback(),
    "WordPiece without cleanup": decoders.WordPiece(cleanup=False),
}


def build_with_decoder(decoder: decoders.Decoder) -> Tokenizer:
    library = add_tokens(build_byte_fallback(), ["</s>"])
    library.decoder = decoder
    return Tokenizer(library.to_str())


BUILDERS: dict[str, Callable[[], Tokenizer]] = {
    "byte": build_byte_tokenizer,
    "char": lambda: build_char_tokenizer("abc \n\ufffdé你"),
    **{
        family: lambda build=build: Tokenizer(add_tokens(build(), ["</s>"], ["<tag>"]).to_str())  # type: ignore[misc]
        for family, build in FAMILIES.items()
    },
    **{name: lambda decoder=decoder: build_with_decoder(decoder) for name, decoder in DECODERS.items()},  # type: ignore[misc]
}


def remove_common_start(text: str, start: str) -> str:
    return text[sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(text, start, strict=False))) :]


@pytest.mark.parametrize("family", BUILDERS)
def test_pieces_are_the_text_of_prompt_and_ids_without_the_prompt(family: str) -> None:
    tokenizer, draw = BUILDERS[family](), random.Random(0)
    byte_heavy = (
        [3 + byte for byte in (*b"a\x80\xe4\xbd\xa0", 0xF0, 0x9F)]
        if family in ("BPE with byte fallback", *DECODERS)
        else []
    )
    for _ in range(2000):
        vocabulary = draw.choice([range(tokenizer.vocab_size + 3), draw.choices(range(tokenizer.vocab_size), k=4)])
        ids = draw.choices([*vocabulary, *byte_heavy * draw.choice([0, 20])], k=draw.randrange(30))
        cut = draw.randrange(len(ids) + 1)
        pieces = list(tokenizer.decode_stream(iter(ids[cut:]), ids[:cut]))
        assert "".join(pieces) == remove_common_start(tokenizer.decode(ids), tokenizer.decode(ids[:cut])), ids
        assert "".join(tokenizer.decode_stream(ids)) == tokenizer.decode(ids)
        assert "" not in pieces


@pytest.mark.parametrize("family", ["BPE with byte fallback", "Unigram", "WordPiece", "byte-level BPE"])
def test_first_new_word_keeps_its_space(family: str) -> None:
    tokenizer = BUILDERS[family]()
    prompt = tokenizer.encode_prompt("one two")
    new = tokenizer.encode("one two three").tolist()[len(prompt) :]
    assert "".join(tokenizer.decode_stream(new, prompt)) == " three"


def test_bytes_that_are_not_utf8_are_shown_as_replacement_characters() -> None:
    tokenizer = Tokenizer(build_byte_fallback().to_str())
    letter = tokenizer.encode("a")[-1]
    assert "".join(tokenizer.decode_stream([3 + 0x41, 3 + 0x80, int(letter)])) == "\ufffd\ufffda"
    assert "".join(tokenizer.decode_stream([3 + 0xE4, 3 + 0xBD])) == "\ufffd\ufffd"


def test_unfinished_character_is_held_back_until_the_end() -> None:
    tokenizer = build_byte_tokenizer()
    assert list(tokenizer.decode_stream("a你b".encode())) == ["a", "你", "b"]
    assert list(tokenizer.decode_stream(b"a\xe4\xbd")) == ["a", "\ufffd"]
    assert list(tokenizer.decode_stream(b"\xbd\xa0b", prompt=b"a\xe4")) == ["你", "b"]


def test_long_stream_decodes_a_few_ids_at_a_time() -> None:
    tokenizer, lengths = build_byte_tokenizer(), []
    decode = tokenizer.decode
    tokenizer.decode = lambda ids: (lengths.append(len(list(ids))), decode(ids))[1]  # type: ignore[method-assign]
    text = "one two \ufffd 你好\n" * 200
    assert "".join(tokenizer.decode_stream(text.encode())) == text
    assert max(lengths) < 12


def test_right_strip_loses_no_space() -> None:
    tokenizer = build_with_decoder(DECODERS["Strip at both ends"])
    assert tokenizer.decode(tokenizer.encode("the ").tolist()) == "the "
    assert tokenizer.decode([]) == ""
