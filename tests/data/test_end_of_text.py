import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import tokenizers

from gpt.configs.data_config import DataConfig
from gpt.data.corpus import open_corpus, prepare_corpus
from gpt.data.end_of_text import TOKENIZER_SETTINGS_FILE, find_first_known_name
from gpt.data.tokenizer import TOKENIZER_FILE, Tokenizer
from gpt.data.tokenizer_builders import build_tokenizer
from gpt.errors import UserError
from tests.data.tokenizer_families import FAMILIES, add_tokens
from tests.data.tokenizer_kinds import BUILDERS


def name_end_of_text(tokenizer: Tokenizer) -> str | None:
    return None if tokenizer.end_of_text is None else tokenizer.name_token(tokenizer.end_of_text)


def build(special: Sequence[str], ordinary: Sequence[str] = ()) -> tokenizers.Tokenizer:
    vocabulary = {character: index for index, character in enumerate("abcdefgh </s>|_[]EOS")}
    vocabulary = {character: index for index, character in enumerate(vocabulary)}
    return add_tokens(tokenizers.Tokenizer(tokenizers.models.BPE(vocabulary, [])), special, ordinary)


@pytest.mark.parametrize(
    ("special", "ordinary", "expected"),
    [
        (["<pad>", "<eos>", "<bos>"], ["</s>"], "<eos>"),  # Gemma 3
        (
            ["<\uff5cbegin▁of▁sentence\uff5c>", "<\uff5cend▁of▁sentence\uff5c>"],
            [],
            "<\uff5cend▁of▁sentence\uff5c>",
        ),  # DeepSeek
        (["<|bos|>", "<|user_start|>", "<|user_end|>"], [], "<|bos|>"),  # nanochat
        (["[UNK]", "[EOS]", "[BOS]"], [], "[EOS]"),
        (["[BOS]", "[EOS]", "<|im_end|>"], [], "[EOS]"),  # Kimi
        (["<s>", "<|im_start|>", "<|im_end|>"], [], "<|im_end|>"),
        (["[PAD]", "[CLS]", "[SEP]", "[MASK]"], [], "[SEP]"),  # BERT
        (["<UNK>", "<EOS_TOKEN>"], [], "<EOS_TOKEN>"),
        (["<|im_start|>", "<|im_end|>", "<|endoftext|>"], [], "<|endoftext|>"),  # Qwen
        (["<|begin_of_text|>", "<|end_of_text|>", "<|eot_id|>"], [], "<|end_of_text|>"),  # Llama 3
        (["<s>", "</s>"], ["<|endoftext|>"], "</s>"),
        (["<END_OF_DOC>", "<|start_of_text|>"], [], "<END_OF_DOC>"),
        (["<|videos|>", "<|theos|>", "<|end_of_turn|>", "<|eos_7b|>"], [], "<|eos_7b|>"),
        (["<doc>", "</doc>"], [], "</doc>"),
        (["<|user|>", "<|assistant|>", "<|end_of_turn|>", "<|videos|>"], [], None),
        (["<mask>"], ["</s>", "<|endoftext|>", "<eos>"], None),
        ([], [], None),
    ],
)
def test_end_of_text_is_a_special_token(special: list[str], ordinary: list[str], expected: str | None) -> None:
    tokenizer = Tokenizer(build(special, ordinary).to_str())
    assert name_end_of_text(tokenizer) == expected


@pytest.mark.parametrize("in_sequence", [False, True])
def test_token_of_unknown_name_that_closes_every_text_is_its_end(in_sequence: bool) -> None:
    library = build(["<|alpha|>", "<|omega|>"])
    ids = [(name, library.token_to_id(name)) for name in ("<|alpha|>", "<|omega|>")]
    template = tokenizers.processors.TemplateProcessing(single="<|alpha|> $A <|omega|>", special_tokens=ids)
    library.post_processor = tokenizers.processors.Sequence([template]) if in_sequence else template
    assert name_end_of_text(Tokenizer(library.to_str())) == "<|omega|>"
    library.post_processor = tokenizers.processors.TemplateProcessing(single="<|alpha|> $A", special_tokens=ids)
    assert Tokenizer(library.to_str()).end_of_text is None


def test_listed_token_that_no_text_becomes_separates_documents() -> None:
    definition = json.loads(BUILDERS["byte"]().definition)
    definition["added_tokens"] = []
    definition["model"]["vocab"]["</s>"] = 256
    assert Tokenizer(json.dumps(definition)).end_of_text == 256
    definition["model"]["ignore_merges"] = True
    definition["pre_tokenizer"]["use_regex"] = False
    assert Tokenizer(json.dumps(definition)).end_of_text is None  # a text `</s>` is this token


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("name", ["</s>", "<|endoftext|>", "<eos>"])
def test_typed_special_token_stays_text(family: str, name: str) -> None:
    library = add_tokens(FAMILIES[family](), ["<unk>", name])
    tokenizer = Tokenizer(library.to_str())
    special = library.token_to_id(name)
    assert tokenizer.end_of_text == special
    for text in (name, f"the {name} model", f"a{name}b", f"{name}{name}", f" {name} "):
        assert special not in tokenizer.encode(text)
        assert special not in tokenizer.encode_prompt(text)


@pytest.mark.parametrize("family", FAMILIES)
def test_text_without_names_has_the_librarys_ids(family: str) -> None:
    library = add_tokens(FAMILIES[family](), ["</s>"], ["<tag>"])
    tokenizer = Tokenizer(library.to_str())
    for text in ("the model", "one <tag>two", "a\n b  c", "you the."):
        assert tokenizer.encode(text).tolist() == library.encode(text, add_special_tokens=False).ids
    assert library.token_to_id("<tag>") in tokenizer.encode("one <tag>two")


def test_merges_that_make_a_special_token_are_not_done() -> None:
    vocabulary = {piece: i for i, piece in enumerate(["<", "/", "s", ">", "</", "s>", "</s>"])}
    merges = [("<", "/"), ("s", ">"), ("</", "s>")]
    library = add_tokens(tokenizers.Tokenizer(tokenizers.models.BPE(vocabulary, merges)), ["</s>"])
    assert Tokenizer(library.to_str()).encode("</s>").tolist() == [4, 5]


@pytest.mark.parametrize("content", ['{"eos_token": "<b>"}', '\ufeff{"eos_token": {"content": "<b>"}}'])
def test_tokenizer_config_beside_the_file_names_end_of_text(tmp_path: Path, content: str) -> None:
    build(["</s>", "<b>"]).save(str(tmp_path / TOKENIZER_FILE))
    path = str(tmp_path / TOKENIZER_FILE)
    assert name_end_of_text(build_tokenizer(path)) == "</s>"
    (tmp_path / TOKENIZER_SETTINGS_FILE).write_text(content)
    assert name_end_of_text(build_tokenizer(path)) == "<b>"
    assert name_end_of_text(build_tokenizer(path, "</s>")) == "</s>"


@pytest.mark.parametrize(
    "content", ['{"eos_token": null}', '{"eos_token": "<c>"}', '{"eos_token": "<tag>"}', "[", "{}"]
)
def test_tokenizer_config_without_a_usable_name_leaves_it_to_the_names(tmp_path: Path, content: str) -> None:
    build(["</s>"], ["<tag>"]).save(str(tmp_path / TOKENIZER_FILE))
    (tmp_path / TOKENIZER_SETTINGS_FILE).write_text(content)
    assert name_end_of_text(build_tokenizer(str(tmp_path / TOKENIZER_FILE))) == "</s>"


def test_flag_that_names_no_separator_is_refused(tmp_path: Path) -> None:
    build(["</s>"], ["<tag>"]).save(str(tmp_path / TOKENIZER_FILE))
    path = str(tmp_path / TOKENIZER_FILE)
    with pytest.raises(UserError, match=r"--data.end-of-text <c>: no token of this name.*special tokens: </s>"):
        build_tokenizer(path, "<c>")
    with pytest.raises(UserError, match=r"--data.end-of-text <tag>: ordinary text may contain this token"):
        build_tokenizer(path, "<tag>")
    with pytest.raises(UserError, match=r"--data.end-of-text </s>: documents end with <\|endoftext\|>"):
        build_tokenizer("byte", "</s>")


@pytest.mark.parametrize(
    ("special", "ordinary"), [(["<eos>"], ["</s>"]), (["<pad>"], ["</s>"]), (["<eos>"], []), (["<bos>"], [])]
)
def test_saved_folder_gives_the_same_end_of_text(tmp_path: Path, special: list[str], ordinary: list[str]) -> None:
    tokenizer = Tokenizer(build(special, ordinary).to_str())
    tokenizer.save(tmp_path)
    assert Tokenizer.from_folder(tmp_path).end_of_text == tokenizer.end_of_text
    is_found_by_name_alone = tokenizer.end_of_text == tokenizer.find_end_of_text(find_first_known_name)
    assert (tmp_path / TOKENIZER_SETTINGS_FILE).exists() == (not is_found_by_name_alone)


@pytest.mark.parametrize("kind", BUILDERS)
def test_folders_of_our_own_tokenizers_hold_the_tokenizer_alone(tmp_path: Path, kind: str) -> None:
    tokenizer = BUILDERS[kind]()
    tokenizer.save(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == [TOKENIZER_FILE]
    assert Tokenizer.from_folder(tmp_path).end_of_text == tokenizer.end_of_text


def test_folder_written_before_ordinary_tokens_were_left_out_keeps_its_end_of_text(tmp_path: Path) -> None:
    library = build(["<eos>"], ["</s>"])
    (tmp_path / TOKENIZER_FILE).write_text(library.to_str())
    assert Tokenizer.from_folder(tmp_path).end_of_text == library.token_to_id("</s>")


@pytest.fixture
def config(tmp_path: Path) -> DataConfig:
    """Write two documents, and a tokenizer with an ordinary `</s>`."""
    (tmp_path / "docs").mkdir()
    (tmp_path / "docs" / "a.txt").write_text("ab </s> cd")
    (tmp_path / "docs" / "b.txt").write_text("ef")
    (tmp_path / "docs" / "c.txt").write_text("ef gh")
    build(["<eos>", "<b>"], ["</s>"]).save(str(tmp_path / "t.json"))
    return DataConfig(source=str(tmp_path / "docs"), cache_dir=tmp_path / "cache", tokenizer=str(tmp_path / "t.json"))


def test_prepared_documents_are_separated_by_the_special_token(config: DataConfig) -> None:
    corpus = open_corpus(prepare_corpus(config), config, 2)
    assert name_end_of_text(corpus.tokenizer) == "<eos>"
    assert corpus.notes == ()
    ids = np.concatenate([stream.read(0, len(stream)) for stream in (*corpus.train.values(), *corpus.val.values())])
    assert (ids == corpus.tokenizer.end_of_text).sum() == 3


def test_flag_is_a_part_of_the_preparation_only_when_given(config: DataConfig) -> None:
    named = config.model_copy(update={"end_of_text": "<b>"})
    first, second = prepare_corpus(config)[0], prepare_corpus(named)[0]
    assert "end_of_text" not in json.loads((first / "corpus.json").read_text())["settings"]
    assert json.loads((second / "corpus.json").read_text())["settings"]["end_of_text"] == "<b>"
    assert name_end_of_text(open_corpus([second], named, 2).tokenizer) == "<b>"
    as_source = named.model_copy(update={"source": (str(first),)})
    with pytest.raises(UserError, match=r"--data.end-of-text <b>: .* was prepared with <eos>"):
        open_corpus([first], as_source, 2)


def test_manifest_of_a_corpus_decides_its_end_of_text(config: DataConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:  # as it was prepared when ordinary tokens counted
        patch.setattr("gpt.data.tokenizer_builders.find_rule_beside", lambda path: find_first_known_name)
        folders = prepare_corpus(config)
    corpus = open_corpus(folders, config, 2)
    assert name_end_of_text(corpus.tokenizer) == "</s>"
    assert any("add --data.end-of-text '<eos>'" in note for note in corpus.notes)


def test_documents_without_a_separator_are_noted(config: DataConfig, tmp_path: Path) -> None:
    build(["<pad>"], ["</s>"]).save(str(tmp_path / "t.json"))
    corpus = open_corpus(prepare_corpus(config), config, 2)
    assert corpus.tokenizer.end_of_text is None
    assert any("no token separates the documents of docs" in note for note in corpus.notes)
    single = config.model_copy(update={"source": (str(tmp_path / "docs" / "a.txt"),)})
    assert open_corpus(prepare_corpus(single), single, 1).notes == ()
