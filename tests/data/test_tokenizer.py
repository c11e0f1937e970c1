from pathlib import Path

import numpy as np
import pytest
import tokenizers
from transformers import PreTrainedTokenizerFast

from gpt.data.byte_level import END_OF_TEXT
from gpt.data.tokenizer import Tokenizer
from gpt.data.tokenizer_builders import (
    build_byte_tokenizer,
    build_char_tokenizer,
)
from gpt.errors import UserError
from tests.data.tokenizer_families import FAMILIES, add_tokens
from tests.data.tokenizer_kinds import BUILDERS, fuzz_text


@pytest.fixture(scope="module", params=BUILDERS)
def tokenizer(request: pytest.FixtureRequest) -> Tokenizer:
    return BUILDERS[request.param]()


def test_ids_equal_the_librarys_on_all_of_unicode(tokenizer: Tokenizer) -> None:
    library = tokenizers.Tokenizer.from_str(tokenizer.definition)
    library.encode_special_tokens = True
    text = fuzz_text()
    assert tokenizer.encode(text).tolist() == library.encode(text, add_special_tokens=False).ids


def test_decode_inverts_encode(tokenizer: Tokenizer) -> None:
    text = fuzz_text()
    assert tokenizer.decode(tokenizer.encode(text).tolist()) == text
    assert "".join(tokenizer.decode_stream(tokenizer.encode(text[:500]).tolist())) == text[:500]


def test_transformers_reads_the_definition(tokenizer: Tokenizer, tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_text(tokenizer.definition)
    reference = PreTrainedTokenizerFast(tokenizer_file=str(tmp_path / "tokenizer.json"))
    sample = fuzz_text()[:300].replace(END_OF_TEXT, "")
    assert reference.encode(sample, add_special_tokens=False) == tokenizer.encode(sample).tolist()
    again = Tokenizer.from_file(tmp_path / "tokenizer.json")
    assert (again.sha256, again.vocab_size) == (tokenizer.sha256, tokenizer.vocab_size)


def test_ids_are_below_the_vocab_size(tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode(fuzz_text())
    assert ids.dtype == np.uint32
    assert ids.max() < tokenizer.vocab_size


def test_truncation_and_padding_of_the_file_are_ignored() -> None:
    library = tokenizers.Tokenizer.from_str(build_byte_tokenizer().definition)
    library.enable_truncation(5)
    library.enable_padding(length=64)
    library.normalizer = tokenizers.normalizers.NFC()  # keeps the fast encoders away
    assert Tokenizer(library.to_str()).encode("x" * 30).tolist() == [ord("x")] * 30


def test_text_that_cannot_be_encoded_is_reported_in_one_line() -> None:
    with pytest.raises(UserError, match="not valid Unicode text: a lone surrogate at character 1"):
        build_byte_tokenizer().encode("a\ud800")
    library = tokenizers.Tokenizer(tokenizers.models.WordLevel({"a": 0}, unk_token="[UNK]"))
    with pytest.raises(UserError, match=r"the tokenizer cannot encode the text: .*UNK"):
        Tokenizer(library.to_str()).encode("b")


def test_empty_prompt_becomes_end_of_text_or_id_0() -> None:
    assert build_byte_tokenizer().encode_prompt("") == [256]
    assert build_char_tokenizer("ab").encode_prompt("") == [0]
    assert build_byte_tokenizer().encode_prompt("a") == [97]


@pytest.mark.parametrize("family", FAMILIES)
def test_counted_bytes_are_those_of_the_decoded_text(family: str) -> None:
    library = add_tokens(FAMILIES[family](), ["<｜end▁of▁text｜>"], ["你好"])  # noqa: RUF001
    tokenizer = Tokenizer(library.to_str())
    ids = np.append(tokenizer.encode("the 你好 model"), np.uint32(library.token_to_id("<｜end▁of▁text｜>")))  # noqa: RUF001
    assert tokenizer.count_bytes(ids) == len(tokenizer.decode(ids.tolist()).encode())
