import json
import logging
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
import tiktoken
import tokenizers
from safetensors.numpy import load_file

from gpt.configs.data_config import PreparationConfig
from gpt.data.manifest import CorpusManifest, read_corpus_manifest
from gpt.data.prepare import learn_tokenizer, part_worker, parts, preparation
from gpt.data.prepare.preparation import plan_preparation, prepare_folder
from gpt.data.shards import TokenStream
from gpt.data.tokenizer import Tokenizer
from gpt.data.tokenizer_builders import train_bpe_tokenizer
from gpt.errors import UserError
from tests.conftest import limit_file_size, make_text, read_files


def prepare(out: Path, sources: Sequence[Path | str], **settings: Any) -> CorpusManifest:
    config = PreparationConfig(**{"tokenizer": "byte", "workers": 1, **settings})
    prepare_folder(out, plan_preparation([str(source) for source in sources], config), "--out")
    return read_corpus_manifest(out)


def decode_documents(folder: Path, role: str) -> list[str]:
    """Every document of a prepared folder, decoded; pieces of one text joined."""
    tokenizer = Tokenizer.from_file(folder / "tokenizer.json")
    found: list[str] = []
    for entry in read_corpus_manifest(folder).sources:
        for shard in entry.train if role == "train" else entry.val:
            arrays = load_file(folder / shard.file)
            borders = arrays["document_offsets"].tolist()
            for number, (first, stop) in enumerate(pairwise(borders)):
                ids = arrays["tokens"][first:stop].tolist()
                continues = shard.continues and number == 0
                has_start = bool(ids) and ids[0] == tokenizer.end_of_text
                assert has_start == (not continues and tokenizer.end_of_text is not None)
                text = tokenizer.decode(ids[has_start:])
                if continues:
                    found[-1] += text
                else:
                    found.append(text)
    return found


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """A folder of texts, lines of JSON, Parquet and one large text, with documents that repeat within and across."""
    root = tmp_path_factory.mktemp("sources")
    texts = [make_text(60 + index % 50, seed=index % 70) for index in range(120)]
    (root / "texts").mkdir()
    for index, text in enumerate(texts[:40]):
        (root / "texts" / f"{index:02d}.txt").write_text(text)
    lines = "".join(json.dumps({"text": text}) + "\n" for text in texts)
    (root / "lines.jsonl").write_text(lines + '{"text": 5}\n')
    pyarrow.parquet.write_table(pyarrow.table({"text": texts[::-1]}), root / "rows.parquet", row_group_size=9)
    (root / "large.txt").write_text(make_text(20_000, seed=1000))
    return [root / name for name in ("texts", "lines.jsonl", "rows.parquet", "large.txt")]


@pytest.fixture
def small_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Workers are given their parts, so it is enough to cut them small here."""
    monkeypatch.setattr(parts, "PART_BYTES", 5000)


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
def test_first_of_equal_documents_is_kept(tmp_path: Path, sources: list[Path]) -> None:
    manifest = prepare(tmp_path / "out", sources, on_error="skip", deduplicate=True, val_fraction=0.0)
    texts = [make_text(60 + index % 50, seed=index % 70) for index in range(120)]
    kept = [*dict.fromkeys([*texts[:40], *texts, *texts[::-1]])]
    assert decode_documents(tmp_path / "out", "train") == [*kept, make_text(20_000, seed=1000)]
    in_folder, in_lines = len({*texts[:40]}), len({*texts})
    assert [entry.duplicates for entry in manifest.sources] == [
        40 - in_folder,
        120 - (in_lines - in_folder),
        120,
        0,
    ]
    assert [entry.skipped_records for entry in manifest.sources] == [0, 1, 0, 0]
    assert manifest.documents == len(kept) + 1


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
    assert stream.document_starts(0, len(stream)).tolist() == [0]


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


# The tokenizers that are learnt.


def test_bpe_is_not_trained_on_validation_text(tmp_path: Path) -> None:
    source = tmp_path / "t.txt"
    source.write_text("abab" * 1000 + "zqzq" * 111)
    prepare(tmp_path / "out", [source], tokenizer="bpe", vocab_size=260)
    tokenizer = Tokenizer.from_file(tmp_path / "out" / "tokenizer.json")
    assert len(tokenizer.encode("ababab")) < 6
    assert len(tokenizer.encode("zqzqzq")) == 6


@pytest.fixture
def learnt_from(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The texts that bpe is trained on."""
    seen: list[str] = []

    def spy(texts: Iterator[str], vocab_size: int) -> Tokenizer:
        seen.extend(texts)
        return train_bpe_tokenizer(seen, vocab_size)

    monkeypatch.setattr(learn_tokenizer, "train_bpe_tokenizer", spy)
    return seen


@pytest.mark.usefixtures("small_parts")
@pytest.mark.parametrize("deduplicate", [False, True])
def test_bpe_is_trained_on_all_of_a_small_training_set(
    tmp_path: Path, sources: list[Path], learnt_from: list[str], deduplicate: bool
) -> None:
    settings = {"tokenizer": "bpe", "vocab_size": 300, "on_error": "skip", "deduplicate": deduplicate}
    prepare(tmp_path / "out", sources, **settings)
    train = decode_documents(tmp_path / "out", "train")
    assert sorted(learnt_from[: len(train) - 1]) == sorted(train[:-1])
    assert "".join(learnt_from[len(train) - 1 :]) == train[-1]


def test_bpe_is_trained_on_a_bounded_sample_from_all_over_the_corpus(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, learnt_from: list[str]
) -> None:
    monkeypatch.setattr(parts, "PART_BYTES", 2**20)
    monkeypatch.setattr(learn_tokenizer, "SAMPLE_BYTES", 2**21)
    source = tmp_path / "t.jsonl"
    with source.open("w") as file:
        for index in range(600):
            file.write(json.dumps({"text": f"document {index:04d} " * 800}) + "\n")
    prepare(tmp_path / "out", [source], tokenizer="bpe", vocab_size=300)
    assert 2**20 < sum(map(len, learnt_from)) < 2**21 + 20_000
    assert not {*learnt_from} & {*decode_documents(tmp_path / "out", "val")}
    numbers = [int(text.split()[1]) for text in learnt_from]
    assert min(numbers) < 100
    assert max(numbers) > 300


def test_sample_of_a_compressed_source_is_bounded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, learnt_from: list[str]
) -> None:
    import gzip

    monkeypatch.setattr(learn_tokenizer, "SAMPLE_BYTES", 2**20)
    lines = "".join(json.dumps({"text": f"document {index:04d} " * 800}) + "\n" for index in range(300))
    (tmp_path / "t.jsonl.gz").write_bytes(gzip.compress(lines.encode()))
    prepare(tmp_path / "out", [tmp_path / "t.jsonl.gz"], tokenizer="bpe", vocab_size=300)
    assert sum(map(len, learnt_from)) < 2**20 + 20_000


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


# Tokens that others made.


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


# What goes wrong.


@pytest.mark.usefixtures("small_parts")
@pytest.mark.parametrize("workers", [1, 2])
def test_bad_record_of_a_later_part_is_reported_in_one_line(tmp_path: Path, sources: list[Path], workers: int) -> None:
    with pytest.raises(UserError, match=rf"^{sources[1]}: line 121: no text under 'text'") as caught:
        prepare(tmp_path / "out", sources, workers=workers)
    assert "\n" not in str(caught.value)
    assert not [path for path in tmp_path.iterdir() if path.is_dir()]


@pytest.mark.parametrize("kind", ["byte", "char", "bpe"])
@pytest.mark.parametrize("content", ["\n\n", '{"text": ""}\n'])
def test_source_without_text_is_an_error(tmp_path: Path, kind: str, content: str) -> None:
    (tmp_path / "t.jsonl").write_text(content)
    with pytest.raises(UserError, match=r"^t: no document has any text; name a source with text in it"):
        prepare(tmp_path / "out", [tmp_path / "t.jsonl"], tokenizer=kind)
    assert not [path for path in tmp_path.iterdir() if path.is_dir()]


@pytest.mark.usefixtures("small_parts")
@pytest.mark.parametrize(
    ("workers", "limit", "deduplicate"),
    [(1, 100, False), (1, 3000, False), (1, 200, True), (1, 12_000, True), (2, 12_000, False)],
)
def test_full_disk_is_reported_in_one_line_and_the_same_command_resumes(
    tmp_path: Path, sources: list[Path], workers: int, limit: int, deduplicate: bool
) -> None:
    settings = {"workers": workers, "deduplicate": deduplicate, "on_error": "skip"}
    with (
        limit_file_size(limit),
        pytest.raises(UserError, match=r"^--out .*out: cannot be written: File too large; run the same command again"),
    ):
        prepare(tmp_path / "out", sources, **settings)
    assert [path.name for path in tmp_path.iterdir() if path.is_dir()] == [".out.unfinished"]
    prepare(tmp_path / "out", sources, **settings)
    prepare(tmp_path / "whole", sources, **{**settings, "workers": 1})
    assert read_files(tmp_path / "out") == read_files(tmp_path / "whole")


def stop_after(monkeypatch: pytest.MonkeyPatch, n_parts: int) -> None:
    """End the next preparation in this process when so many parts are done."""
    done = []
    work = part_worker.PartWorker.do

    def do(self: part_worker.PartWorker, action: part_worker.Action, *task: Any) -> None:
        if len(done) == n_parts:
            monkeypatch.setattr(part_worker.PartWorker, "do", work)
            raise KeyboardInterrupt
        work(self, action, *task)
        done.append(action == "shards")

    monkeypatch.setattr(part_worker.PartWorker, "do", do)


@pytest.mark.usefixtures("small_parts")
def test_unfinished_folder_of_another_preparation_is_refused(
    tmp_path: Path, sources: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    stop_after(monkeypatch, 3)
    with pytest.raises(KeyboardInterrupt):
        prepare(tmp_path / "out", sources, on_error="skip")
    with pytest.raises(
        UserError, match=r"\.out\.unfinished holds an unfinished preparation of other sources or settings"
    ):
        prepare(tmp_path / "out", sources, on_error="skip", val_fraction=0.2)
    with pytest.raises(UserError, match=r"unfinished preparation of other"):
        prepare(tmp_path / "out", sources[:1], on_error="skip")
    assert not (tmp_path / "out").exists()
    prepare(tmp_path / "out", sources, on_error="skip", workers=2)
    prepare(tmp_path / "whole", sources, on_error="skip")
    assert read_files(tmp_path / "out") == read_files(tmp_path / "whole")


@pytest.mark.slow
@pytest.mark.parametrize("has_identity", [True, False])
def test_kill_before_the_final_rename_is_resumed(
    tmp_path: Path, sources: list[Path], monkeypatch: pytest.MonkeyPatch, has_identity: bool
) -> None:
    """Killed between the manifest and the rename."""
    config = PreparationConfig(tokenizer="byte", workers=1)
    plan = plan_preparation([str(sources[3])], config)

    def killed(path: Path, *_: object, **__: object) -> None:
        if path.exists():
            raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(*((preparation.shutil, "rmtree") if has_identity else (Path, "rename")), killed)
        prepare_folder(tmp_path / "out", plan, "--out")
    unfinished = tmp_path / ".out.unfinished"
    assert (unfinished / "corpus.json").exists()
    assert (unfinished / "preparation.json").exists() == has_identity
    if has_identity:
        with pytest.raises(UserError, match="unfinished preparation of other"):
            prepare(tmp_path / "out", sources[:1])
        prepare_folder(tmp_path / "out", plan, "--out")
    else:
        prepare(tmp_path / "out", sources[:1])
    prepare(tmp_path / "whole", [sources[3]] if has_identity else sources[:1])
    assert read_files(tmp_path / "out") == read_files(tmp_path / "whole")


@pytest.mark.usefixtures("small_parts")
def test_broken_stream_keeps_finished_parts(
    tmp_path: Path, sources: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "hub"
    folder.mkdir()
    for index in range(3):
        (folder / f"train-{index:05d}-of-00003.jsonl").write_text(json.dumps({"text": f"text {index}"}) + "\n")
    read = parts.read_stream

    def broken(address: str, records: Any, shard: int, n_shards: int) -> Iterator[Any]:
        if shard == 2:
            raise UserError("the network is gone")
        yield from read(address, records, shard, n_shards)

    with monkeypatch.context() as patch, pytest.raises(UserError, match="the network is gone"):
        patch.setattr(parts, "read_stream", broken)
        prepare(tmp_path / "out", [f"hf:{folder}"], val_fraction=0.0)
    shards = {path.name: path.stat().st_ino for path in (tmp_path / ".out.unfinished").glob("*.safetensors")}
    assert len(shards) == 2
    prepare(tmp_path / "out", [f"hf:{folder}"], val_fraction=0.0)
    assert {name: (tmp_path / "out" / name).stat().st_ino for name in shards} == shards
    assert decode_documents(tmp_path / "out", "train") == ["text 0", "text 1", "text 2"]


# Processes that are killed.

START = (
    "import sys, gpt.data.prepare.parts as parts; parts.PART_BYTES = 30_000; "
    "from gpt.main import main; sys.exit(main())"
)


@pytest.fixture(scope="module")
def lines(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("lines") / "lines.jsonl"
    with path.open("w") as file:
        for index in range(3000):
            file.write(json.dumps({"text": make_text(1000, seed=index % 2900)}) + "\n")
    return path


def start_preparation(lines: Path, out: Path) -> "subprocess.Popen[str]":
    command = [sys.executable, "-c", START, "prepare", str(lines), "--out", str(out)]
    flags = ["--workers", "2", "--tokenizer", "byte", "--deduplicate"]
    return subprocess.Popen(
        [*command, *flags], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, start_new_session=True
    )


def list_finished_shards(out: Path) -> dict[str, tuple[int, int]]:
    """The shards of the finished parts, as they lie on the disk."""
    unfinished = out.with_name(f".{out.name}.unfinished")
    found = {}
    for record in unfinished.glob("parts/*.json"):
        for role in ("train", "val"):
            shard = unfinished / f"{role}-{record.stem}.safetensors"
            if shard.exists():
                found[shard.name] = (shard.stat().st_ino, shard.stat().st_mtime_ns)
    return found


def wait_for(is_so: Callable[[], object], process: "subprocess.Popen[str]", seconds: float = 60) -> None:
    until = time.monotonic() + seconds
    while not is_so():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < until
        time.sleep(0.002)


def children(pid: int) -> list[int]:
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


@pytest.mark.slow
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="looks into /proc")
def test_preparation_resumes_after_any_kill(tmp_path: Path, lines: Path) -> None:
    out = tmp_path / "out"
    draw = random.Random(0)
    kept: dict[str, tuple[int, int]] = {}
    for kill in ("group", "group", "worker", "interrupt", "parent"):
        process = start_preparation(lines, out)
        if kill == "group" and not kept:
            wait_for((tmp_path / ".out.unfinished").exists, process)  # in the midst of looking for duplicates
        else:
            wanted = len(kept) + draw.randrange(1, 8)
            wait_for(lambda: len(list_finished_shards(out)) >= wanted, process)  # noqa: B023
        time.sleep(draw.random() / 30)
        workers = children(process.pid)
        if kill == "worker":
            os.kill(workers[0], signal.SIGKILL)
            _, error = process.communicate(timeout=20)
            assert process.returncode == 2
            assert error.endswith(f"or delete {tmp_path / '.out.unfinished'}\n")
            assert (
                f"--out {out}: a process that prepares data was killed by SIGKILL; run the same command again" in error
            )
            assert len(error.splitlines()) == 1
        elif kill == "interrupt":
            os.killpg(process.pid, signal.SIGINT)
            _, error = process.communicate(timeout=20)
            assert (process.returncode, error) == (130, "gpt: interrupted\n")
        else:
            os.killpg(process.pid, signal.SIGKILL) if kill == "group" else process.kill()
            process.communicate(timeout=20)
        until = time.monotonic() + 10
        while any(Path(f"/proc/{worker}/stat").exists() for worker in workers):  # none survives who started it
            assert time.monotonic() < until
            time.sleep(0.01)
        assert not out.exists()
        assert kept.items() <= list_finished_shards(out).items()
        kept = list_finished_shards(out)
    assert len(kept) > 0
    process = start_preparation(lines, out)
    _, error = process.communicate(timeout=120)
    assert (process.returncode, error) == (0, "")
    assert {name: ((out / name).stat().st_ino, (out / name).stat().st_mtime_ns) for name in kept} == kept
    whole = tmp_path / "whole"
    config = PreparationConfig(tokenizer="byte", workers=1, deduplicate=True)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(parts, "PART_BYTES", 30_000)
        prepare_folder(whole, plan_preparation([str(lines)], config), "--out")
    assert read_files(out) == read_files(whole)
    assert read_corpus_manifest(whole).sources[0].duplicates == 100


def test_worker_imports_no_torch() -> None:
    code = "import sys, gpt.data.prepare.workers; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


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
