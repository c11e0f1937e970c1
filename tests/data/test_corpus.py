import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file

from gpt.configs.data_config import DataConfig
from gpt.configs.train_config import TrainConfig
from gpt.data.corpus import Corpus, load_corpus, open_corpus, prepare_corpus
from gpt.data.prepare import compression
from gpt.errors import UserError
from gpt.pipeline import build_trainer
from gpt.run import open_run
from gpt.utils.distributed import DistContext
from tests.conftest import limit_file_size, make_text

BLOCK = 16


def prepare_and_open(config: DataConfig) -> Corpus:
    return open_corpus(prepare_corpus(config), config, BLOCK)


def write_text_files(path: Path, sizes: list[int]) -> Path:
    path.mkdir()
    for index, size in enumerate(sizes):
        (path / f"{index:03d}.txt").write_text(chr(97 + index % 26) * size)
    return path


@pytest.fixture
def config(tmp_path: Path) -> DataConfig:
    """Write a small text, to be prepared as bytes into its own cache."""
    (tmp_path / "t.txt").write_text("some text " * 50)
    return DataConfig(source=str(tmp_path / "t.txt"), cache_dir=tmp_path / "c", tokenizer="byte")


def test_documents_begin_with_end_of_text_and_keep_their_byte_counts(tmp_path: Path) -> None:
    source = write_text_files(tmp_path / "s", [30] * 25)
    (source / "000.txt").write_text("é" * 30)
    config = DataConfig(source=str(source), cache_dir=tmp_path / "cache", tokenizer="byte")
    (folder,) = prepare_corpus(config)
    corpus = open_corpus([folder], config, BLOCK)
    arrays = load_file(folder / "train-000000.safetensors")
    starts = arrays["document_offsets"][:-1].astype(int)
    assert set(arrays["tokens"][starts].tolist()) == {corpus.tokenizer.end_of_text}
    assert np.all(np.diff(arrays["document_offsets"].astype(int)) - 1 == arrays["document_bytes"])
    assert corpus.facts.val_tokens == corpus.facts.val_bytes + corpus.facts.val_documents
    assert corpus.facts.train_tokens == len(corpus.train["s"])


def test_validation_source_leaves_the_training_text_uncut(tmp_path: Path) -> None:
    (tmp_path / "train.txt").write_text("a" * 100)
    (tmp_path / "val.txt").write_text("b" * 50)
    corpus = prepare_and_open(
        DataConfig(
            source=str(tmp_path / "train.txt"),
            val_source=str(tmp_path / "val.txt"),
            cache_dir=tmp_path / "c",
            tokenizer="char",
        )
    )
    assert corpus.train["train"].read(0, 100).tolist() == [0] * 100
    assert corpus.val["val"].read(0, 50).tolist() == [1] * 50


def test_second_preparation_uses_the_cache(config: DataConfig) -> None:
    (folder,) = prepare_corpus(config)
    before = {path: path.stat().st_mtime_ns for path in folder.iterdir()}
    assert prepare_corpus(config) == [folder]
    assert {path: path.stat().st_mtime_ns for path in folder.iterdir()} == before


def test_corpus_of_a_cut_file_in_the_cache_of_an_earlier_version_is_not_used(
    config: DataConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "t.txt.zst"
    # A frame of two blocks of repeated bytes, without its last block.
    blocks = [(100, b"a"), (100, b"b")]
    path.write_bytes(b"\x28\xb5\x2f\xfd\x00\x58" + b"".join((n << 3 | 2).to_bytes(3, "little") + c for n, c in blocks))
    config = config.with_(source=str(path))
    with monkeypatch.context() as earlier:
        earlier.setattr(compression, "_require_complete_frames", lambda path, file: None)
        prepare_corpus(config)
    with pytest.raises(UserError, match=r"t.txt.zst: cannot be read: ends in the middle of a frame; copy or download"):
        prepare_corpus(config)


def test_cache_is_keyed_by_content_and_settings(config: DataConfig, tmp_path: Path) -> None:
    (tmp_path / "records.jsonl").write_text('{"text": "some text", "body": "some text"}\n' * 20)
    records = (str(tmp_path / "records.jsonl"),)
    changes: list[dict[str, Any]] = [
        {},
        {"val_fraction": 0.2},
        {"tokenizer": "char"},
        {"tokenizer": "bpe", "vocab_size": 260},
        {"tokenizer": "bpe", "vocab_size": 261},
        {"deduplicate": True},
        {"on_error": "skip"},
        {"source": records},
        {"source": records, "text_field": "body"},
        {"val_source": config.source},
        {"source": config.source * 2},
    ]
    folders = [prepare_corpus(config.model_copy(update=change))[0] for change in changes]
    Path(config.source[0]).write_text("other text " * 50)
    folders += prepare_corpus(config)
    assert len(set(folders)) == len(changes) + 1
    same = {"workers": 3, "weights": (1.0,), "packing": "best-fit", "vocab_size": 500}
    assert prepare_corpus(config.model_copy(update=same)) == folders[-1:]


def test_cache_is_keyed_by_the_content_of_a_tokenizer_file(config: DataConfig, tmp_path: Path) -> None:
    (folder,) = prepare_corpus(config)
    path = tmp_path / "mine.json"
    shutil.copy(folder / "tokenizer.json", path)
    first = prepare_corpus(config.model_copy(update={"tokenizer": str(path)}))
    path.write_text(path.read_text().replace("<|endoftext|>", "</s>"))
    second = prepare_corpus(config.model_copy(update={"tokenizer": str(path)}))
    assert first != second
    shutil.copy(path, tmp_path / "moved.json")
    assert prepare_corpus(config.model_copy(update={"tokenizer": str(tmp_path / "moved.json")})) == second


def test_xz_bits_per_byte_of_the_validation_text(tmp_path: Path) -> None:
    source = tmp_path / "t.txt"
    source.write_text("a" * 9000 + "".join(chr(97 + (i * i) % 23) for i in range(1000)))
    facts = prepare_and_open(DataConfig(source=str(source), cache_dir=tmp_path, tokenizer="byte")).facts
    assert facts.xz_bits_per_byte is not None
    assert 0 < facts.xz_bits_per_byte < 8


def test_failed_preparation_leaves_no_folder(tmp_path: Path) -> None:
    source = tmp_path / "t.txt"
    source.write_text("text")
    (tmp_path / "tokenizer.json").write_text("{}")
    config = DataConfig(source=str(source), cache_dir=tmp_path / "c", tokenizer=str(tmp_path / "tokenizer.json"))
    with pytest.raises(UserError, match="not a Hugging Face"):
        prepare_corpus(config)
    assert [path for path in (tmp_path / "c").iterdir() if path.is_dir()] == []


def test_folder_without_its_manifest_is_prepared_again(config: DataConfig) -> None:
    (folder,) = prepare_corpus(config)
    (folder / "corpus.json").unlink()
    assert len(prepare_and_open(config).train["t"]) == 451


def test_full_disk_names_the_cache_and_leaves_no_finished_folder(tmp_path: Path) -> None:
    source = tmp_path / "t.txt"
    source.write_text("some text " * 5000)
    config = DataConfig(source=str(source), cache_dir=tmp_path / "c", tokenizer="byte")
    with (
        limit_file_size(20_000),
        pytest.raises(
            UserError, match=r"--data.cache-dir .*: cannot be written: .*too large; run the same command again"
        ),
    ):
        prepare_corpus(config)
    assert not [path for path in (tmp_path / "c").iterdir() if path.is_dir() and not path.name.startswith(".")]
    assert len(prepare_and_open(config).train["t"]) == 45_001


def test_changed_cache_names_the_folder_to_delete(config: DataConfig) -> None:
    (folder,) = prepare_corpus(config)
    (folder / "train-000000.safetensors").unlink()
    with pytest.raises(UserError, match=rf"is missing; delete the folder {folder}"):
        open_corpus([folder], config, BLOCK)


def test_another_tokenizer_of_the_same_size_is_detected_by_its_digest(config: DataConfig) -> None:
    (folder,) = prepare_corpus(config)
    path = folder / "tokenizer.json"
    path.write_text(path.read_text().replace('"A":65,', '"A":66,').replace('"B":66,', '"B":65,'))
    with pytest.raises(UserError, match=rf"{path}: not the tokenizer of this corpus: its SHA-256 is .*; restore it"):
        open_corpus([folder], config, BLOCK)
    path.unlink()
    with pytest.raises(UserError, match=rf"{path}: cannot be read"):
        open_corpus([folder], config, BLOCK)


def prepare_named(tmp_path: Path, name: str, **settings: Any) -> Path:
    """Make a folder as gpt prepare does."""
    (tmp_path / f"{name}.txt").write_text(make_text(800, seed=len(name)))
    cache = tmp_path / f"cache-{name}"
    config = {"source": str(tmp_path / f"{name}.txt"), "cache_dir": cache, "tokenizer": "byte", **settings}
    return prepare_corpus(DataConfig(**config))[0].rename(tmp_path / name)


def test_prepared_folder_is_a_source(tmp_path: Path, tiny: Callable[..., TrainConfig]) -> None:
    one = prepare_named(tmp_path, "one")
    (tmp_path / "one.txt").unlink()
    config = tiny(tmp_path / "run", max_steps=2, data={"source": str(one), "tokenizer": "bpe"})  # the default
    opened = open_run(config)
    assert opened.corpus.facts.vocab_size == 257
    assert [*opened.corpus.train] == [*opened.corpus.val] == ["one"]
    build_trainer(opened).train()


def test_prepared_folders_are_mixed_by_weight(tmp_path: Path, tiny: Callable[..., TrainConfig]) -> None:
    folders = [str(prepare_named(tmp_path, name)) for name in ("one", "second")]
    base = {"source": folders, "tokenizer": "bpe"}
    opened = open_run(tiny(tmp_path / "run", max_steps=2, data={**base, "weights": [3, 1]}))
    assert [*opened.corpus.train] == [*opened.corpus.val] == ["one", "second"]
    build_trainer(opened).train()
    together = open_corpus([Path(folder) for folder in folders], DataConfig(**base), BLOCK)
    assert [len(stream) for stream in together.train.values()] == [sum(map(len, opened.corpus.train.values()))]
    with pytest.raises(UserError, match=r"--data.weights: 3 for the sources one, second; give one for each"):
        open_run(tiny(tmp_path / "other", data={**base, "weights": [1, 1, 1]}))


def test_folders_of_different_tokenizers_are_not_mixed(tmp_path: Path) -> None:
    folders = [prepare_named(tmp_path, "one"), prepare_named(tmp_path, "second", tokenizer="char")]
    with pytest.raises(UserError, match=rf"{folders[1]} was prepared with another tokenizer than {folders[0]}"):
        open_corpus(folders, DataConfig(), BLOCK)


def test_prepared_and_other_sources_are_not_mixed(tmp_path: Path) -> None:
    folder = prepare_named(tmp_path, "one")
    with pytest.raises(UserError, match=rf"--data.source {folder} is prepared and others are not; .*gpt prepare"):
        prepare_corpus(DataConfig(source=(str(folder), str(tmp_path / "one.txt")), cache_dir=tmp_path / "c"))
    with pytest.raises(UserError, match=rf"--data.source {folder} is prepared and others are not"):
        prepare_corpus(DataConfig(source=str(folder), val_source=str(tmp_path / "one.txt"), cache_dir=tmp_path / "c"))


def test_other_tokenizer_than_a_prepared_folders_is_reported(tmp_path: Path) -> None:
    folder = prepare_named(tmp_path, "one")
    same = tmp_path / "same.json"
    shutil.copy(folder / "tokenizer.json", same)

    def open_notes(source: str, tokenizer: str) -> tuple[str, ...]:
        return open_corpus([folder], DataConfig(source=source, tokenizer=tokenizer), BLOCK).notes

    for right in ("byte", str(same), "bpe"):
        assert open_notes(str(folder), right) == ()
    assert open_notes("stdlib", "gpt2") == ()
    assert open_notes(str(folder), "gpt2") == (f"the tokenizer is that of {folder}, not gpt2",)
    other = tmp_path / "other.json"
    other.write_text(same.read_text().replace("<|endoftext|>", "</s>"))
    with pytest.raises(
        UserError,
        match=rf"--data.tokenizer {other}: .* another tokenizer, of SHA-256 [0-9a-f]{{64}}; leave out the flag",
    ):
        open_notes(str(folder), str(other))


def test_number_of_weights_must_equal_number_of_sources(config: DataConfig) -> None:
    with pytest.raises(UserError, match=r"--data.weights: 2 for 1 sources; give one for each"):
        prepare_corpus(config.model_copy(update={"weights": (1.0, 2.0)}))


def test_cache_may_not_lie_in_a_source(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("a text " * 100)
    config = DataConfig(source=str(tmp_path), tokenizer="byte", cache_dir=tmp_path / "cache")
    with pytest.raises(UserError, match=f"^--data.cache-dir {tmp_path / 'cache'} lies in the source {tmp_path}; name"):
        prepare_corpus(config)
    assert len(prepare_corpus(config.with_(cache_dir=tmp_path / ".cache"))) == 1


class RankOfAnotherMachine(DistContext):
    """A rank that gets from rank 0 what another machine has prepared."""

    def __init__(self, folders: list[str] | None, sha256: str):
        super().__init__("cpu")
        self._folders, self._sha256 = folders, sha256

    def on_local_main(self, work: Callable[[], Any]) -> Any:
        own = work()
        return own if self._folders is None else self._folders

    def broadcast(self, value: Any, source: int = 0) -> Any:
        return self._sha256


def test_other_data_than_that_of_rank_0_is_an_error(config: DataConfig) -> None:
    own = prepare_corpus(config)
    sha256 = open_corpus(own, config, 8).facts.sha256
    assert load_corpus(config, 8, RankOfAnotherMachine(None, sha256)).facts.sha256 == sha256
    message = f"^the data of --data.source differs from that of rank 0: {own[0]} here, /cache/0a there; give every"
    with pytest.raises(UserError, match=message):
        load_corpus(config, 8, RankOfAnotherMachine(["/cache/0a"], sha256))
    with pytest.raises(UserError, match=f"^the data of --data.source differs .*: {sha256} here, 0a there; give every"):
        load_corpus(config, 8, RankOfAnotherMachine(None, "0a"))
