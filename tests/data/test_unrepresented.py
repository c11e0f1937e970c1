import json
from pathlib import Path

import pytest
from tokenizers import Tokenizer as Library
from tokenizers import decoders, models, normalizers, pre_tokenizers

from gpt.configs.data_config import DataConfig
from gpt.data.corpus import open_corpus, prepare_corpus
from gpt.data.manifest import read_corpus_manifest
from gpt.data.tokenizer import Tokenizer
from gpt.data.unrepresented import Unrepresented
from gpt.errors import UserError
from tests.data.tokenizer_families import FAMILIES, add_tokens
from tests.data.tokenizer_kinds import BUILDERS, fuzz_text


def build_dropping_bpe(**settings: str | bool) -> Library:
    """Return BPE of a few letters, which drops all others."""
    return Library(models.BPE({"a": 0, "b": 1, " ": 2, "ab": 3, "?": 4}, [("a", "b")], **settings))


def find(library: Library, text: str) -> Unrepresented | None:
    tokenizer = Tokenizer(library.to_str())
    return tokenizer.find_unrepresented(text, tokenizer.encode(text))


def test_dropped_characters_are_counted_with_the_first_place() -> None:
    found = find(build_dropping_bpe(), "ab zzz aéb")
    assert found == Unrepresented(characters=4, n_bytes=5, first="'z' at character 3")
    assert find(build_dropping_bpe(), "ab ba") is None


def test_unknown_tokens_of_bpe_are_counted() -> None:
    assert find(build_dropping_bpe(unk_token="?"), "ab zzz") == Unrepresented(3, 3, "'z' at character 3")


@pytest.mark.parametrize(
    ("family", "text", "expected"),
    [
        ("Unigram", "the 你好 model", Unrepresented(2, 6, "'你好' at character 4")),
        ("WordPiece", "the é model 你", Unrepresented(2, 5, "'é' at character 4")),
        ("WordLevel", "the café model", Unrepresented(4, 5, "'café' at character 4")),
        ("BPE with suffixes", "ab é", Unrepresented(1, 2, "'é' at character 3")),
        ("BPE with byte fallback", "ab é 你\r\n", None),
        ("byte-level BPE", "ab é 你\r\n", None),
    ],
)
def test_every_family_finds_what_it_cannot_represent(family: str, text: str, expected: Unrepresented | None) -> None:
    assert find(add_tokens(FAMILIES[family](), ["</s>"]), text) == expected
    assert find(add_tokens(FAMILIES[family](), ["</s>"]), "the model") is None


@pytest.mark.parametrize("kind", BUILDERS)
def test_our_own_tokenizers_represent_everything(kind: str) -> None:
    tokenizer = BUILDERS[kind]()
    assert tokenizer.find_unrepresented(fuzz_text(), tokenizer.encode(fuzz_text())) is None


def test_byte_level_vocabulary_without_some_bytes_drops_them() -> None:
    definition = json.loads(BUILDERS["byte"]().definition)
    del definition["model"]["vocab"]["Ġ"]  # the space
    found = find(Library.from_str(json.dumps(definition)), "a b c")
    assert found == Unrepresented(2, 2, "' ' at character 1")


def test_byte_fallback_without_some_bytes_drops_their_characters() -> None:
    vocabulary = {"a": 0} | {f"<0x{byte:02X}>": byte + 1 for byte in "é".encode()}
    library = Library(models.BPE(vocabulary, [("a", "a")][:0], byte_fallback=True))
    library.pre_tokenizer = pre_tokenizers.Split("x", "isolated")  # so that it is no vocabulary of characters
    assert find(library, "aéa") is None
    assert find(library, "aéü") == Unrepresented(1, 2, "'ü' at character 2")


def test_added_tokens_and_normalized_characters_are_represented() -> None:
    library = add_tokens(build_dropping_bpe(), [], ["你好"])
    assert find(library, "ab你好") is None
    assert find(library, "ab你") == Unrepresented(1, 3, "'你' at character 2")
    library.normalizer = normalizers.Lowercase()
    assert find(library, "AB") is None


def test_characters_that_a_normalizer_removes_are_counted() -> None:
    library = Library.from_str(BUILDERS["byte"]().definition)
    library.normalizer = normalizers.Sequence([normalizers.NFD(), normalizers.StripAccents()])
    assert find(library, "cafe\u0301 e\u0301") == Unrepresented(2, 4, "'\u0301' at character 4")
    assert find(library, "cafe e") is None
    dropping = build_dropping_bpe()
    dropping.normalizer = normalizers.Sequence([normalizers.Replace("b", ""), normalizers.Strip()])
    assert find(dropping, " abz ") == Unrepresented(2, 2, "'z' at character 1")


def test_white_space_that_only_separates_words_is_represented() -> None:
    library = build_dropping_bpe()
    library.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    assert find(library, "ab\n ba") is None


@pytest.fixture
def config(tmp_path: Path) -> DataConfig:
    library = add_tokens(build_dropping_bpe(), ["<eos>"])
    library.decoder = decoders.Fuse()
    library.save(str(tmp_path / "t.json"))
    (tmp_path / "text.txt").write_text("ab zzz aéb" * 10)
    return DataConfig(
        source=str(tmp_path / "text.txt"),
        cache_dir=tmp_path / "c",
        tokenizer=str(tmp_path / "t.json"),
        val_fraction=0.5,
    )


def test_bits_per_byte_count_no_bytes_without_a_token(config: DataConfig) -> None:
    corpus = open_corpus(prepare_corpus(config), config, 2)
    assert corpus.facts.val_bytes == 5 * len("ab  ab")
    assert any(
        "text: the tokenizer has no token for 40 characters, first 'z' at character 3" in n for n in corpus.notes
    )
    (entry,) = read_corpus_manifest(prepare_corpus(config)[0]).sources
    assert (entry.unrepresented, entry.first_unrepresented) == (40, "'z' at character 3 of text.txt")


def test_text_without_any_token_is_refused(config: DataConfig, tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text("zzz")
    with pytest.raises(UserError, match=r"no token for any of its 3 characters, first 'z' at character 0 of text\.txt"):
        prepare_corpus(config)


def test_manifest_of_a_represented_corpus_has_no_new_keys(config: DataConfig, tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text("ab ba")
    content = json.loads((prepare_corpus(config)[0] / "corpus.json").read_text())
    assert content["sources"][0].keys() == {"name", "sha256", "train", "val", "skipped_records", "duplicates"}
