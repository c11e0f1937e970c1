import logging
import os
import shutil
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiktoken
import tokenizers
from safetensors.numpy import load_file

from gpt.configs.data_config import PreparationConfig
from gpt.data.prepare.preparation_plan import plan_preparation
from gpt.data.shards import TokenStream
from gpt.errors import UserError
from tests.conftest import make_text, read_files
from tests.data.prepare.prepared import decode_documents, prepare


@pytest.mark.usefixtures("small_parts")
def test_folder_is_equal_at_any_number_of_workers(tmp_path: Path, sources: list[Path]) -> None:
    folders = []
    for workers in (1, 2, 3):
        settings = {"tokenizer": "bpe", "vocab_size": 300, "on_error": "skip", "deduplicate": True}
        manifest = prepare(tmp_path / str(workers), sources, workers=workers, **settings)
        folders.append(read_files(tmp_path / str(workers)))
    assert len(manifest.sources[3].train) > 15
    assert folders[0] == folders[1] == folders[2]
    shards = {shard.file for entry in manifest.sources for shard in (*entry.train, *entry.val)}
    assert set(folders[0]) == {"corpus.json", "tokenizer.json", *shards}
    assert all(path.name.isdigit() for path in tmp_path.iterdir())  # nothing else is left behind


@pytest.mark.usefixtures("small_parts")
def test_every_document_is_in_exactly_one_split(tmp_path: Path, sources: list[Path]) -> None:
    prepare(tmp_path / "out", sources, on_error="skip", val_fraction=0.2)
    train, val = (decode_documents(tmp_path / "out", role) for role in ("train", "val"))
    texts = [make_text(60 + index % 50, seed=index % 70) for index in range(120)]
    large = make_text(20_000, seed=1000)
    assert train[-1] + val[-1] == large
    assert abs(len(val[-1]) / len(large) - 0.2) < 0.001
    assert sorted(train[:-1] + val[:-1]) == sorted(texts[:40] + texts + texts)
    size = sum(map(len, val[:-1])) / sum(map(len, texts[:40] + texts + texts))
    assert 0.15 < size < 0.25  # whole documents, of which a part here has a dozen


@pytest.mark.usefixtures("small_parts")
def test_large_text_has_the_ids_of_the_uncut_text_and_one_end_of_text(tmp_path: Path, sources: list[Path]) -> None:
    manifest = prepare(tmp_path / "out", [sources[3]], tokenizer="bpe", vocab_size=400, val_fraction=0.0)
    (entry,) = manifest.sources
    assert len(entry.train) > 10
    assert [shard.continues for shard in entry.train] == [False] + [True] * (len(entry.train) - 1)
    assert manifest.documents == 1
    stream = TokenStream([(tmp_path / "out", shard) for shard in entry.train], manifest.vocab_size)
    library = tokenizers.Tokenizer.from_file(str(tmp_path / "out" / "tokenizer.json"))
    ids = stream.read(0, len(stream)).tolist()
    assert ids == [manifest.special_ids["end_of_text"], *library.encode(sources[3].read_text()).ids]
    assert stream.find_document_starts(0, len(stream)).tolist() == [0]


def test_folder_does_not_depend_on_where_the_sources_are(tmp_path: Path, sources: list[Path]) -> None:
    for name in ("here", "there"):
        shutil.copytree(sources[0], tmp_path / name / "texts")
        prepare(tmp_path / name / "out", [tmp_path / name / "texts"])
    assert read_files(tmp_path / "here" / "out") == read_files(tmp_path / "there" / "out")
    for content in read_files(tmp_path / "here" / "out").values():
        for secret in (str(tmp_path), os.uname().nodename, time.strftime("%Y-%m-%d")):
            assert secret.encode() not in content


def test_left_out_records_and_duplicates_are_logged(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    source = tmp_path / "t.jsonl"
    source.write_text('{"text": "one"}\nnonsense\n{"text": "one"}\n{"body": "two"}\n{"text": "three"}\n')
    with caplog.at_level(logging.INFO):
        manifest = prepare(tmp_path / "out", [source], on_error="skip", deduplicate=True)
    assert caplog.messages[-2:] == ["t: left out 2 bad records", "t: left out 1 duplicate"]
    assert [record.levelno for record in caplog.records[-2:]] == [logging.WARNING, logging.INFO]
    assert (manifest.sources[0].skipped_records, manifest.sources[0].duplicates, manifest.documents) == (2, 1, 2)


def word_tokenizer(path: Path, size: int) -> Path:
    library = tokenizers.Tokenizer(
        tokenizers.models.WordLevel({f"w{index}": index for index in range(size)}, unk_token="w0")
    )
    library.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    library.save(str(path))
    return path


def test_ids_above_16_bits_are_kept(tmp_path: Path) -> None:
    tokenizer = str(word_tokenizer(tmp_path / "words.json", 70_001))
    (tmp_path / "t.txt").write_text("w70000 w1 w65536")
    np.save(tmp_path / "t.npy", np.array([70_000, 1, 65_536]))
    for name in ("t.txt", "t.npy"):
        out = tmp_path / f"{name}.out"
        manifest = prepare(out, [tmp_path / name], tokenizer=tokenizer, val_fraction=0.0)
        assert (manifest.dtype, manifest.largest_id, manifest.vocab_size) == ("uint32", 70_000, 70_001)
        tokens = load_file(out / "train-000000.safetensors")["tokens"]
        assert tokens.dtype == np.uint32
        assert tokens.tolist() == [70_000, 1, 65_536]


@pytest.mark.usefixtures("small_parts")
def test_token_files_are_prepared_unchanged(tmp_path: Path) -> None:
    encoding = tiktoken.Encoding(
        "gpt2",
        pat_str=r"\S+|\s+",
        mergeable_ranks={bytes([byte]): byte for byte in range(256)},
        special_tokens={"<|endoftext|>": 256},
    )
    texts = [make_text(30, seed=index) for index in range(60)]
    ids = [index for text in texts for index in [*encoding.encode_ordinary(text), 256]]
    np.array(ids, np.uint16).tofile(tmp_path / "train.bin")
    manifest = prepare(tmp_path / "out", [tmp_path / "train.bin"], tokenizer="byte", val_fraction=0.0)
    assert decode_documents(tmp_path / "out", "train") == texts
    assert manifest.text_bytes == sum(map(len, texts))
    assert len(manifest.sources[0].train) > 3
    assert manifest.xz_bits_per_byte is None


@pytest.mark.usefixtures("small_parts")
@pytest.mark.parametrize("workers", [1, 2])
def test_bad_record_of_a_later_part_is_reported_in_one_line(tmp_path: Path, sources: list[Path], workers: int) -> None:
    with pytest.raises(UserError, match=rf"^{sources[1]}: line 121: no text under 'text'") as caught:
        prepare(tmp_path / "out", sources, workers=workers)
    assert "\n" not in str(caught.value)
    assert not [path for path in tmp_path.iterdir() if path.is_dir()]


def test_document_that_the_tokenizer_cannot_encode_is_named(tmp_path: Path) -> None:
    tokenizers.Tokenizer(tokenizers.models.Unigram([("a", -1.0)], unk_id=None)).save(str(tmp_path / "t.json"))
    (tmp_path / "texts").mkdir()
    (tmp_path / "texts" / "b.txt").write_text("ab")
    with pytest.raises(UserError, match=r"^b.txt: the tokenizer cannot encode the text: .*; use another one"):
        prepare(tmp_path / "out", [tmp_path / "texts"], tokenizer=str(tmp_path / "t.json"))


@pytest.mark.parametrize("kind", ["byte", "char", "bpe"])
@pytest.mark.parametrize("content", ["\n\n", '{"text": ""}\n'])
def test_source_without_text_is_an_error(tmp_path: Path, kind: str, content: str) -> None:
    (tmp_path / "t.jsonl").write_text(content)
    with pytest.raises(UserError, match=r"^t: no document has any text; name a source with text in it"):
        prepare(tmp_path / "out", [tmp_path / "t.jsonl"], tokenizer=kind)
    assert not [path for path in tmp_path.iterdir() if path.is_dir()]


def test_cache_key_depends_on_everything_that_decides_the_content(sources: list[Path]) -> None:
    def key(*names: Path, **settings: Any) -> str:
        return plan_preparation([str(name) for name in names], PreparationConfig(**settings)).key

    keys = [
        key(*sources),
        key(*sources[::-1]),
        key(*sources[:2], val_source=[str(path) for path in sources[2:]]),
        key(*sources, val_fraction=0),
        key(*sources, tokenizer="char"),
    ]
    assert len({*keys}) == len(keys)
    assert key(*sources, workers=7) == keys[0]
