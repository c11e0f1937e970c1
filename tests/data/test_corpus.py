from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

from gpt.configs.data_config import DataConfig
from gpt.data.corpus import LARGEST_SHARE, open_corpus, prepare, split
from gpt.data.formats import Document, Records
from gpt.data.readers import read_source
from gpt.errors import UserError
from tests.conftest import small_files


def folder_of(path: Path, sizes: list[int]) -> Path:
    path.mkdir()
    for index, size in enumerate(sizes):
        (path / f"{index:03d}.txt").write_text(chr(97 + index % 26) * size)
    return path


def test_stdlib_is_split_by_document_and_no_document_rules_the_val_set() -> None:
    documents = read_source("stdlib", Records("text", skip_bad=False))
    train, val = split(documents, 0.1)
    assert sorted(d.name for d in train + val) == sorted(d.name for d in documents)
    total = sum(d.n_bytes for d in val)
    assert 0.1 <= total / sum(d.n_bytes for d in documents) < 0.106
    assert max(d.n_bytes for d in val) <= LARGEST_SHARE * total


def test_the_split_does_not_depend_on_order() -> None:
    documents = [Document(str(index), "x" * (index + 1)) for index in range(50)]
    assert {d.name for d in split(documents, 0.1)[1]} == {d.name for d in split(documents[::-1], 0.1)[1]}


def test_one_file_loses_its_tail_as_nanogpt_splits() -> None:
    text = "".join(chr(97 + index % 26) for index in range(1001))
    train, val = split([Document("t", text)], 0.1)
    assert (train[0].text, val[0].text) == (text[: int(1001 * 0.9)], text[int(1001 * 0.9) :])


@pytest.mark.parametrize("count", [2, 3, 10])
def test_few_documents_are_split_whole_and_one_is_left_to_train_on(count: int) -> None:
    documents = [Document(str(index), "x" * 100 * (index + 1)) for index in range(count)]
    train, val = split(documents, 0.1)
    assert train
    assert val
    assert sorted(train + val, key=lambda d: int(d.name)) == documents


def test_large_documents_wait_until_no_other_is_left() -> None:
    documents = [Document(f"large{index}", "x" * 1000) for index in range(30)] + [Document("small", "y" * 10)]
    _, val = split(documents, 0.1)
    assert "small" in {d.name for d in val}
    assert sum(d.n_bytes for d in val) >= 0.1 * 30_010


def test_documents_begin_with_end_of_text_and_keep_their_byte_counts(tmp_path: Path) -> None:
    source = folder_of(tmp_path / "s", [30] * 25)
    (source / "000.txt").write_text("é" * 30)
    folder = prepare(DataConfig(source=str(source), cache_dir=tmp_path / "cache", tokenizer="byte"))
    corpus = open_corpus(folder)
    arrays = load_file(folder / "train-00000.safetensors")
    starts = arrays["document_offsets"][:-1].astype(int)
    assert set(arrays["tokens"][starts].tolist()) == {corpus.tokenizer.end_of_text}
    assert np.all(np.diff(arrays["document_offsets"].astype(int)) - 1 == arrays["document_bytes"])
    assert corpus.facts.val_tokens == corpus.facts.val_bytes + corpus.facts.val_documents
    assert corpus.facts.train_tokens == len(corpus.train)


def test_bpe_never_sees_the_validation_text(tmp_path: Path) -> None:
    source = tmp_path / "t.txt"
    source.write_text("abab" * 1000 + "zqzq" * 111)
    corpus = open_corpus(prepare(DataConfig(source=str(source), cache_dir=tmp_path / "c", vocab_size=260)))
    assert len(corpus.tokenizer.encode("ababab")) < 6
    assert len(corpus.tokenizer.encode("zqzqzq")) == 6


def test_a_separate_validation_source_leaves_the_training_text_whole(tmp_path: Path) -> None:
    (tmp_path / "train.txt").write_text("a" * 100)
    (tmp_path / "val.txt").write_text("b" * 50)
    config = DataConfig(
        source=str(tmp_path / "train.txt"), val_source=str(tmp_path / "val.txt"), cache_dir=tmp_path, tokenizer="char"
    )
    corpus = open_corpus(prepare(config))
    assert corpus.train.read(0, 100).tolist() == [0] * 100
    assert corpus.val.read(0, 50).tolist() == [1] * 50


def test_a_second_preparation_reads_the_cache(tmp_path: Path) -> None:
    source = tmp_path / "t.txt"
    source.write_text("some text " * 50)
    config = DataConfig(source=str(source), cache_dir=tmp_path / "c", tokenizer="byte")
    folder = prepare(config)
    before = {path: path.stat().st_mtime_ns for path in folder.iterdir()}
    assert prepare(config) == folder
    assert {path: path.stat().st_mtime_ns for path in folder.iterdir()} == before


def test_the_cache_is_keyed_by_content_and_settings(tmp_path: Path) -> None:
    source = tmp_path / "t.txt"
    source.write_text("some text " * 50)
    config = DataConfig(source=str(source), cache_dir=tmp_path / "c", tokenizer="byte")
    variants = [
        config,
        config.model_copy(update={"val_fraction": 0.2}),
        config.model_copy(update={"tokenizer": "char"}),
    ]
    folders = [prepare(variant) for variant in variants]
    source.write_text("other text " * 50)
    folders.append(prepare(config))
    assert len(set(folders)) == 4


def test_xz_is_told_for_the_validation_text(tmp_path: Path) -> None:
    source = tmp_path / "t.txt"
    source.write_text("a" * 9000 + "".join(chr(97 + (i * i) % 23) for i in range(1000)))
    facts = open_corpus(prepare(DataConfig(source=str(source), cache_dir=tmp_path, tokenizer="byte"))).facts
    assert facts.xz_bits_per_byte is not None
    assert 0 < facts.xz_bits_per_byte < 8


def test_a_failed_preparation_leaves_nothing(tmp_path: Path) -> None:
    source = tmp_path / "t.txt"
    source.write_text("text")
    (tmp_path / "tokenizer.json").write_text("{}")
    config = DataConfig(source=str(source), cache_dir=tmp_path / "c", tokenizer=str(tmp_path / "tokenizer.json"))
    with pytest.raises(UserError, match="not a Hugging Face"):
        prepare(config)
    assert [path for path in (tmp_path / "c").iterdir() if path.is_dir()] == []


@pytest.mark.parametrize("content", ["", "{", "{}", "[]", '{"splits": {"train": [{}]}}'])
def test_a_damaged_manifest_says_what_to_delete(tmp_path: Path, content: str) -> None:
    (tmp_path / "corpus.json").write_text(content)
    with pytest.raises(UserError, match=r"corpus.json: damaged; delete the folder"):
        open_corpus(tmp_path)


def test_a_cache_without_its_manifest_is_made_again(tmp_path: Path) -> None:
    source = tmp_path / "t.txt"
    source.write_text("some text " * 50)
    config = DataConfig(source=str(source), cache_dir=tmp_path / "c", tokenizer="byte")
    folder = prepare(config)
    (folder / "corpus.json").unlink()
    assert len(open_corpus(prepare(config)).train) == 451


def test_a_full_disk_names_the_cache_and_leaves_nothing(tmp_path: Path) -> None:
    source = tmp_path / "t.txt"
    source.write_text("some text " * 5000)
    with small_files(20_000), pytest.raises(UserError, match=r"--data.cache-dir .*: cannot be written: .*too large"):
        prepare(DataConfig(source=str(source), cache_dir=tmp_path / "c", tokenizer="byte"))
    assert [path for path in (tmp_path / "c").iterdir() if path.is_dir()] == []


def test_a_changed_cache_says_what_to_delete(tmp_path: Path) -> None:
    source = tmp_path / "t.txt"
    source.write_text("some text " * 50)
    folder = prepare(DataConfig(source=str(source), cache_dir=tmp_path / "c", tokenizer="byte"))
    (folder / "train-00000.safetensors").unlink()
    with pytest.raises(UserError, match=f"is missing; delete the folder {folder}"):
        open_corpus(folder)
