import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from gpt.data.prepare import learn_tokenizer, parts
from gpt.data.tokenizer import Tokenizer
from gpt.data.tokenizer_builders import train_bpe_tokenizer
from gpt.errors import UserError
from tests.data.prepare.prepared import decode_documents, prepare


def test_bpe_is_not_trained_on_validation_text(tmp_path: Path) -> None:
    source = tmp_path / "t.txt"
    source.write_text("abab" * 1000 + "zqzq" * 111)
    prepare(tmp_path / "out", [source], tokenizer="bpe", vocab_size=260)
    tokenizer = Tokenizer.from_file(tmp_path / "out" / "tokenizer.json")
    assert len(tokenizer.encode("ababab")) < 6
    assert len(tokenizer.encode("zqzqzq")) == 6


@pytest.fixture
def learned_from(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Return the texts that bpe is trained on."""
    seen: list[str] = []

    def spy(texts: Iterator[str], vocab_size: int) -> Tokenizer:
        seen.extend(texts)
        return train_bpe_tokenizer(seen, vocab_size)

    monkeypatch.setattr(learn_tokenizer, "train_bpe_tokenizer", spy)
    return seen


@pytest.mark.usefixtures("small_parts")
@pytest.mark.parametrize("deduplicate", [False, True])
def test_bpe_is_trained_on_all_of_a_small_training_set(
    tmp_path: Path, sources: list[Path], learned_from: list[str], deduplicate: bool
) -> None:
    settings = {"tokenizer": "bpe", "vocab_size": 300, "on_error": "skip", "deduplicate": deduplicate}
    prepare(tmp_path / "out", sources, **settings)
    train = decode_documents(tmp_path / "out", "train")
    assert sorted(learned_from[: len(train) - 1]) == sorted(train[:-1])
    assert "".join(learned_from[len(train) - 1 :]) == train[-1]


def test_bpe_is_trained_on_a_bounded_sample_from_all_over_the_corpus(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, learned_from: list[str]
) -> None:
    monkeypatch.setattr(parts, "PART_BYTES", 2**20)
    monkeypatch.setattr(learn_tokenizer, "SAMPLE_BYTES", 2**21)
    source = tmp_path / "t.jsonl"
    with source.open("w") as file:
        for index in range(600):
            file.write(json.dumps({"text": f"document {index:04d} " * 800}) + "\n")
    prepare(tmp_path / "out", [source], tokenizer="bpe", vocab_size=300)
    assert 2**20 < sum(map(len, learned_from)) < 2**21 + 20_000
    assert not {*learned_from} & {*decode_documents(tmp_path / "out", "val")}
    numbers = [int(text.split()[1]) for text in learned_from]
    assert min(numbers) < 100
    assert max(numbers) > 300


def test_sample_of_a_compressed_source_is_bounded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, learned_from: list[str]
) -> None:
    import gzip

    monkeypatch.setattr(learn_tokenizer, "SAMPLE_BYTES", 2**20)
    lines = "".join(json.dumps({"text": f"document {index:04d} " * 800}) + "\n" for index in range(300))
    (tmp_path / "t.jsonl.gz").write_bytes(gzip.compress(lines.encode()))
    prepare(tmp_path / "out", [tmp_path / "t.jsonl.gz"], tokenizer="bpe", vocab_size=300)
    assert sum(map(len, learned_from)) < 2**20 + 20_000


@pytest.mark.usefixtures("small_parts")
def test_char_tokenizer_has_every_character_and_end_of_text_if_needed(tmp_path: Path) -> None:
    def tokenizer(name: str, *sources: Path, **settings: Any) -> Tokenizer:
        prepare(tmp_path / name, sources, tokenizer="char", **settings)
        return Tokenizer.from_file(tmp_path / name / "tokenizer.json")

    one = tmp_path / "one.txt"
    one.write_text("ab " * 10_000 + "z")  # the last is in the validation text alone
    assert tokenizer("a", one).encode(" abz").tolist() == [0, 1, 2, 3]
    assert tokenizer("b", one).end_of_text is None
    other = tmp_path / "other.txt"
    other.write_text("c")
    assert tokenizer("c", one, val_source=str(other)).end_of_text is None  # one document in each
    assert tokenizer("d", one, other).end_of_text == 5
    lines = tmp_path / "lines.jsonl"
    lines.write_text('{"text": "ab"}\n{"text": "ab"}\n')
    assert tokenizer("e", lines, val_fraction=0.0).end_of_text == 2
    assert tokenizer("f", lines, val_fraction=0.0, deduplicate=True).end_of_text is None


def test_no_tokenizer_is_learned_from_token_files(tmp_path: Path) -> None:
    np.array([1, 2, 0] * 100, np.uint16).tofile(tmp_path / "train.bin")
    for kind in ("bpe", "char"):
        with pytest.raises(
            UserError, match=r"train.bin holds tokens, from which no tokenizer can be learned; set --data.tokenizer"
        ):
            prepare(tmp_path / "out", [tmp_path / "train.bin"], tokenizer=kind)
    np.array([1, 2, 300] * 100, np.uint16).tofile(tmp_path / "train.bin")
    with pytest.raises(
        UserError, match=r"train.bin: token 300 at offset 2 is not in the vocabulary of 257; set --data.tokenizer"
    ):
        prepare(tmp_path / "out", [tmp_path / "train.bin"], tokenizer="byte")
    assert not list(tmp_path.glob(".*unfinished*"))
