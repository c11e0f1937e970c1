import json
import random
from pathlib import Path
from typing import Any

import pytest
import tokenizers

from gpt.data.byte_level import END_OF_TEXT, bytes_to_chars, chars_to_bytes, list_all_merges
from gpt.data.encoders import PROBE_TEXT, TiktokenEncoder, find_probe
from gpt.data.tokenizer import KNOWN_TIKTOKEN_COMPATIBLE, Tokenizer
from gpt.data.tokenizer_builders import (
    build_byte_tokenizer,
    build_gpt2_tokenizer,
    build_tokenizer,
)
from tests.data.tokenizer_kinds import BUILDERS, TEXT, fuzz_text, random_short_texts


def test_definitions_known_as_tiktoken_compatible_are_compatible() -> None:
    gpt2 = build_gpt2_tokenizer()
    model = json.loads(gpt2.definition)["model"]
    assert {gpt2.sha256} == KNOWN_TIKTOKEN_COMPATIBLE
    assert find_probe(model["vocab"], model) == PROBE_TEXT


@pytest.mark.parametrize("text", [END_OF_TEXT, f"a{END_OF_TEXT}{END_OF_TEXT}\n{END_OF_TEXT[:-1]}", END_OF_TEXT[1:] * 9])
def test_special_token_name_in_text_is_encoded_as_text(text: str) -> None:
    tokenizer = build_gpt2_tokenizer()
    library = tokenizers.Tokenizer.from_str(tokenizer.definition)
    library.encode_special_tokens = True
    assert tokenizer.encode(text).tolist() == library.encode(text, add_special_tokens=False).ids
    assert tokenizer.end_of_text not in tokenizer.encode(text)


def test_other_tokenizers_are_encoded_by_the_library(tmp_path: Path) -> None:
    library = tokenizers.Tokenizer(tokenizers.models.WordLevel({"[UNK]": 0, "the": 1, "model": 2}, unk_token="[UNK]"))
    library.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    library.save(str(tmp_path / "words.json"))
    tokenizer = build_tokenizer(str(tmp_path / "words.json"))
    assert tokenizer.encode("the model is").tolist() == [1, 2, 0]
    assert (tokenizer.vocab_size, tokenizer.end_of_text) == (3, None)


def test_ids_in_another_order_than_the_merges_are_encoded_by_the_library(tmp_path: Path) -> None:
    """Check a vocabulary like RoBERTa's: GPT-2's merges under other ids."""
    definition = json.loads(BUILDERS["bpe"]().definition)
    tokens = sorted(definition["model"]["vocab"])
    definition["model"]["vocab"] = {token: index for index, token in enumerate(tokens)}
    definition["added_tokens"] = []
    shuffled = Tokenizer(json.dumps(definition))
    library = tokenizers.Tokenizer.from_str(json.dumps(definition))
    assert shuffled.encode(TEXT).tolist() == library.encode(TEXT).ids
    assert len(shuffled.encode(TEXT)) == len(BUILDERS["bpe"]().encode(TEXT))


LLAMA3_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


ISOLATED, REMOVED = {"behavior": "Isolated", "invert": False}, {"behavior": "Removed", "invert": True}


def with_split(pattern: str, normalizer: str | None = None, behavior: dict[str, Any] = ISOLATED) -> str:
    """Return a byte-level BPE whose words are cut by its own expression, as in Llama 3's and Qwen's tokenizer.json."""
    definition = json.loads(BUILDERS["bpe"]().definition)
    split = {"type": "Split", "pattern": {"Regex": pattern}, **behavior}
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
    definition["pre_tokenizer"] = {"type": "Sequence", "pretokenizers": [split, byte_level]}
    definition["normalizer"] = normalizer and {"type": normalizer}
    definition["model"]["ignore_merges"] = True
    return json.dumps(definition)


@pytest.mark.parametrize("normalizer", [None, "NFC"])
@pytest.mark.parametrize("behavior", [ISOLATED, REMOVED], ids=["llama3", "gpt4o"])
def test_word_pattern_of_the_file_is_encoded_by_tiktoken(normalizer: str | None, behavior: dict[str, Any]) -> None:
    definition = with_split(LLAMA3_PATTERN, normalizer, behavior)
    tokenizer, library = Tokenizer(definition), tokenizers.Tokenizer.from_str(definition)
    library.encode_special_tokens = True
    assert isinstance(tokenizer._encode, TiktokenEncoder)
    assert tokenizer.encode(fuzz_text()).tolist() == library.encode(fuzz_text()).ids


def with_all_merges(kind: str) -> dict[str, Any]:
    """Return a vocabulary with every merge that forms one of its tokens, as Llama 3's tokenizer.json lists them."""
    definition: dict[str, Any] = json.loads(with_split(LLAMA3_PATTERN))
    vocabulary = json.loads(BUILDERS[kind]().definition)["model"]["vocab"]
    vocabulary.pop(END_OF_TEXT, None)
    ranks = {chars_to_bytes(token): rank for token, rank in vocabulary.items()}
    merges = [(bytes_to_chars(left), bytes_to_chars(right)) for left, right in list_all_merges(ranks)]
    definition["model"] |= {"vocab": vocabulary, "merges": merges}
    return definition | {"added_tokens": []}


def test_merges_of_every_way_to_each_token_are_encoded_by_tiktoken() -> None:
    definition = with_all_merges("gpt2")
    tokenizer, library = Tokenizer(json.dumps(definition)), tokenizers.Tokenizer.from_str(json.dumps(definition))
    assert len(definition["model"]["merges"]) > 2 * len(definition["model"]["vocab"])
    assert isinstance(tokenizer._encode, TiktokenEncoder)
    draw = random.Random(0)
    tokens = [chars_to_bytes(token).decode(errors="ignore") for token in definition["model"]["vocab"]]
    runs = [token for token in tokens if len(set(token)) == 1 < len(token)]  # where places of a token overlap
    words = ["".join(draw.choices(draw.choice([tokens, runs]), k=draw.randrange(1, 8))) for _ in range(20_000)]
    for text in (fuzz_text(), " ".join(words), "\n".join(words)):
        assert tokenizer.encode(text).tolist() == library.encode(text).ids


@pytest.mark.parametrize("change", ["ignore_merges", "missing", "order"])
def test_other_merges_than_every_way_to_each_token_are_encoded_by_the_library(change: str) -> None:
    definition = with_all_merges("bpe")
    assert isinstance(Tokenizer(json.dumps(definition))._encode, TiktokenEncoder)
    merges = definition["model"]["merges"]
    match change:
        case "ignore_merges":
            definition["model"]["ignore_merges"] = False
        case "missing":
            del merges[len(merges) // 2]
        case "order":
            merges[0], merges[-1] = merges[-1], merges[0]
    assert not isinstance(Tokenizer(json.dumps(definition))._encode, TiktokenEncoder)


@pytest.mark.parametrize("pattern", [r"\w+", r"(?<=a)\p{L}+|.", r"[a&&[^b]]|\s+|\S+"])
def test_word_pattern_that_tiktoken_reads_differently_is_encoded_by_the_library(pattern: str) -> None:
    definition = with_split(pattern)
    library = tokenizers.Tokenizer.from_str(definition)
    assert Tokenizer(definition).encode(TEXT).tolist() == library.encode(TEXT).ids


@pytest.mark.parametrize("run", [" ", "\n", " \n", "a", "\u00e9"])
def test_ids_of_a_million_repeated_characters_equal_the_librarys(run: str) -> None:
    tokenizer = build_gpt2_tokenizer()
    text = "x" + run * (1_000_000 // len(run)) + "y"
    assert tokenizer.encode(text).tolist() == tokenizers.Tokenizer.from_str(tokenizer.definition).encode(text).ids


def test_encoding_in_chunks_gives_the_ids_of_the_uncut_text() -> None:
    tokenizer = build_gpt2_tokenizer()
    assert isinstance(tokenizer._encode, TiktokenEncoder)
    reference = tokenizer._encode._encoding
    for text in random_short_texts():
        assert tokenizer._encode.encode_in_chunks(text, 1).tolist() == reference.encode_ordinary(text)


@pytest.mark.parametrize("merges", [["b c", "a b", "ab c"], ["a b", "c d", "b c", "a bcd", "bc d"]])
def test_merges_that_tiktoken_would_not_do_are_encoded_by_the_library(merges: list[str]) -> None:
    definition = json.loads(build_byte_tokenizer().definition)
    merged = [merge.replace(" ", "") for merge in merges]
    for token in merged:
        definition["model"]["vocab"].setdefault(token, len(definition["model"]["vocab"]))
    if "bcd" not in merged:
        definition["model"]["vocab"].setdefault("bcd", len(definition["model"]["vocab"]))
    definition["model"]["merges"] = [merge.split() for merge in merges]
    definition["added_tokens"] = []
    library = tokenizers.Tokenizer.from_str(json.dumps(definition))
    for text in ("abc", "abcd", "xabcdabc bcd"):
        assert Tokenizer(json.dumps(definition)).encode(text).tolist() == library.encode(text).ids


def test_vocabulary_without_some_byte_is_encoded_by_the_library() -> None:
    definition = json.loads(BUILDERS["bpe"]().definition)
    del definition["model"]["vocab"]["Q"]
    definition["added_tokens"] = []
    library = tokenizers.Tokenizer.from_str(json.dumps(definition))
    assert Tokenizer(json.dumps(definition)).encode("Quick Q").tolist() == library.encode("Quick Q").ids


def test_two_tokens_with_one_id_are_encoded_by_the_library(capfd: pytest.CaptureFixture[str]) -> None:
    definition = json.loads(BUILDERS["byte"]().definition)
    vocabulary = definition["model"]["vocab"]
    vocabulary["Q"] = vocabulary["R"]
    library = tokenizers.Tokenizer.from_str(json.dumps(definition))
    assert Tokenizer(json.dumps(definition)).encode("QR").tolist() == library.encode("QR").ids
    assert capfd.readouterr().err == ""  # tiktoken panics there, and says so


@pytest.mark.parametrize("missing", ["normalizer", "pre_tokenizer", "added_tokens", "decoder"])
def test_optional_keys_of_the_definition_may_be_absent(missing: str) -> None:
    definition = json.loads(BUILDERS["bpe"]().definition)
    del definition[missing]
    text = json.dumps(definition)
    assert Tokenizer(text).encode("abc def").tolist() == tokenizers.Tokenizer.from_str(text).encode("abc def").ids


def test_character_vocabulary_with_unknown_token_is_encoded_by_the_library() -> None:
    library = tokenizers.Tokenizer(tokenizers.models.BPE({"<unk>": 0, "a": 1}, [], unk_token="<unk>"))
    assert Tokenizer(library.to_str()).encode("aba").tolist() == [1, 0, 1]
