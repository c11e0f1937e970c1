import gzip
import json
import random
import struct
from collections.abc import Callable
from pathlib import Path

import datasets
import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
import tiktoken
import zstandard

from gpt.data.prepare import parts as module
from gpt.data.prepare.parts import Part, cut_into_parts, read_part
from gpt.data.prepare.records import Records
from gpt.data.prepare.sources import find_source
from gpt.data.tokenizer import Tokenizer
from gpt.data.tokenizer_builders import build_gpt2_tokenizer
from gpt.errors import UserError
from tests.conftest import make_text

TEXTS = [make_text(20 + index, seed=index) + "é\u2028🙂\r\n" * (index % 3) for index in range(60)]
LINES = "".join(json.dumps({"id": index, "text": text}) + "\n" for index, text in enumerate(TEXTS)).encode()
RECORDS = Records("text", skip_bad=False)


@pytest.fixture(scope="module")
def gpt2() -> Tokenizer:
    return build_gpt2_tokenizer()


def cut(
    path: Path | str,
    *,
    val_fraction: float = 0.0,
    role: module.Role | None = "train",
    tokenizer: Tokenizer | None = None,
) -> list[Part]:
    files = find_source(str(path)).files
    return cut_into_parts(files, RECORDS, val_fraction=val_fraction, role=role, tokenizer=tokenizer)


def write_folder(path: Path) -> Path:
    path.mkdir()
    for index, text in enumerate(TEXTS):
        (path / f"{index:03d}.txt").write_bytes(text.encode())
    return path


def write_bytes(path: Path, content: bytes) -> Path:
    path.write_bytes(content)
    return path


def write_parquet(path: Path) -> Path:
    pyarrow.parquet.write_table(pyarrow.table({"text": TEXTS}), path, row_group_size=7)
    return path


def write_dataset(path: Path) -> Path:
    datasets.Dataset.from_dict({"text": TEXTS}).save_to_disk(str(path))
    return path


def write_hub(path: Path) -> str:
    path.mkdir()
    for index in range(4):
        (path / f"train-{index:05d}-of-00004.jsonl").write_bytes(
            b"".join(LINES.splitlines(keepends=True)[15 * index : 15 * index + 15])
        )
    return f"hf:{path}"


# Source, whether it is cut into more parts if they are to be smaller.
SOURCES: dict[str, tuple[Callable[[Path], Path | str], bool]] = {
    "folder": (write_folder, True),
    "t.jsonl": (lambda path: write_bytes(path, LINES), True),
    "t.jsonl.gz": (lambda path: write_bytes(path, gzip.compress(LINES)), False),
    "t.jsonl.zst": (lambda path: write_bytes(path, zstandard.compress(LINES)), False),
    "t.parquet": (write_parquet, True),
    "saved": (write_dataset, True),
    "streamed": (write_hub, True),
}


@pytest.mark.parametrize("name", SOURCES)
def test_documents_of_a_source_do_not_depend_on_the_part_size(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    write, is_cut = SOURCES[name]
    source = write(tmp_path / name)
    uncut = [document for part in cut(source) for document in read_part(part, RECORDS)]
    assert [document.content.decode() for document in uncut] == TEXTS
    for size in (1000, 5000) if name == "folder" else (1, 100, 1000, 5000):
        monkeypatch.setattr(module, "PART_BYTES", size)
        monkeypatch.setattr(module, "ROWS_PER_PART", max(1, size // 100))
        parts = cut(source)
        assert [document for part in parts for document in read_part(part, RECORDS)] == uncut
        assert not any(part.continues for part in parts)
        assert (len(parts) > 1) == is_cut
    if name in ("folder", "t.jsonl"):
        assert sum(part.size for part in parts) == sum(file.size for file in find_source(str(source)).files)


def test_lines_belong_to_the_part_in_which_they_begin(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "PART_BYTES", 2000)
    for part in cut(write_bytes(tmp_path / "t.jsonl", LINES)):
        assert part.start == 0 or LINES[part.start - 1 : part.start] == b"\n"
        assert part.stop is not None and LINES[part.stop - 1 : part.stop] == b"\n"
        assert part.stop - part.start < 2000 + max(map(len, LINES.splitlines()))


def test_bad_line_of_a_later_part_is_named_by_its_number_in_the_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "PART_BYTES", 2000)
    path = write_bytes(tmp_path / "t.jsonl", b"\n" + LINES + b'{"text": 5}\n')
    *_, last = cut(path)
    assert last.start > 0
    with pytest.raises(UserError, match=rf"^{path}: line 62: no text under 'text'"):
        list(read_part(last, RECORDS))


def test_bad_row_of_a_later_part_is_named_by_its_number_in_the_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "PART_BYTES", 1)
    monkeypatch.setattr(module, "ROWS_PER_PART", 7)
    path = tmp_path / "t.parquet"
    pyarrow.parquet.write_table(pyarrow.table({"text": ["a"] * 20 + [None]}), path, row_group_size=5)
    datasets.Dataset.from_dict({"text": ["a"] * 20 + [None]}).save_to_disk(str(tmp_path / "saved"))
    for source in (path, tmp_path / "saved"):
        with pytest.raises(UserError, match=rf"^{source}: row 20: no text under 'text'"):
            list(read_part(cut(source)[-1], RECORDS))


WHITE = [" ", " ", " ", "\n", "\n\n", "  ", "\t", "\r\n", " \n ", "\u00a0", "\u3000"]


def large_text(seed: int, n_words: int = 4000) -> str:
    draw = random.Random(seed)
    words = ["the", "it's", "naïve", "字典", "🙂", "x=1", "1234", "e\u0301", "...", "Ünder"]
    return "".join(draw.choice(words) + draw.choice(WHITE) for _ in range(n_words))


@pytest.mark.parametrize("size", [50, 999, 20_000])
def test_ids_of_a_large_text_do_not_depend_on_its_cuts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, gpt2: Tokenizer, size: int
) -> None:
    monkeypatch.setattr(module, "PART_BYTES", size)
    text = large_text(size)
    parts = cut(write_bytes(tmp_path / "t.txt", text.encode()))
    assert len(parts) > 1
    assert [part.continues for part in parts] == [False] + [True] * (len(parts) - 1)
    pieces = [document.content.decode() for part in parts for document in read_part(part, RECORDS)]
    assert "".join(pieces) == text
    theirs = tiktoken.Encoding(
        "gpt2",
        pat_str=r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+",
        mergeable_ranks=decode_ranks(gpt2),
        special_tokens={},
    )
    assert [index for piece in pieces for index in gpt2.encode(piece).tolist()] == theirs.encode_ordinary(text)
    if size == 50:
        assert sum(len(piece.encode()) < 2 * size for piece in pieces) > 0.9 * len(pieces)


def decode_ranks(gpt2: Tokenizer) -> dict[bytes, int]:
    """Return the vocabulary of GPT-2 with bytes for its printable characters, as ByteLevel decodes them."""
    vocabulary = json.loads(gpt2.definition)["model"]["vocab"]
    byte_of = {token: index for token, index in vocabulary.items() if len(token) == 1}
    order = [*range(33, 127), *range(161, 173), *range(174, 256)]
    order += [byte for byte in range(256) if byte not in order]
    table = {token: order[index] for token, index in byte_of.items() if index < 256}
    return {bytes(table[character] for character in token): index for token, index in vocabulary.items()}


@pytest.mark.parametrize("val_fraction", [0.1, 0.25])
def test_tail_of_a_large_text_is_held_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, val_fraction: float) -> None:
    monkeypatch.setattr(module, "PART_BYTES", 1000)
    for lead in ("", "x", "xx"):  # so that the border falls on every byte of a character
        content = (lead + "字" * 5000).encode()
        parts = cut(write_bytes(tmp_path / "t.txt", content), val_fraction=val_fraction, role=None)
        texts = {
            role: b"".join(d.content for part in parts if part.role == role for d in read_part(part, RECORDS))
            for role in ("train", "val")
        }
        assert texts["train"] + texts["val"] == content
        assert 0 <= len(texts["val"]) - len(content) * val_fraction < 4
        assert not next(part for part in parts if part.role == "val").continues


def test_text_without_word_boundaries_is_one_part(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "PART_BYTES", 1000)
    assert len(cut(write_bytes(tmp_path / "t.txt", b"a" * 200_000))) == 1
    assert len(cut(write_bytes(tmp_path / "t.txt", b"a" * 100_000 + b" " + b"b" * 100_000))) == 2
    assert len(cut(write_bytes(tmp_path / "t.jsonl", b'{"text": "' + b"a" * 100_000 + b'"}'))) == 1


def test_text_that_is_not_utf8_is_named_with_its_offset_in_the_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "PART_BYTES", 1000)
    path = write_bytes(tmp_path / "t.txt", b"some words " * 1000 + b"\xff" + b" more" * 100)
    with pytest.raises(UserError, match=rf"^{path}: not UTF-8 at byte offset 11000 \(0xff\)"):
        [list(read_part(part, RECORDS)) for part in cut(path)]


@pytest.mark.parametrize("size", [1, 6, 11])
def test_configured_fraction_of_many_large_texts_is_held_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, size: int
) -> None:
    """Make up a part of two texts; split by itself, half of it would be held out."""
    monkeypatch.setattr(module, "PART_BYTES", 10_000)
    names = []
    (tmp_path / "texts").mkdir()
    for index in range(60):
        names.append(f"{index:02d}.txt")
        (tmp_path / "texts" / names[-1]).write_bytes(b"word " * 200 * size)
    parts = cut(tmp_path / "texts", val_fraction=0.1, role=None)
    found = {role: [name for part in parts if part.role == role for name, _ in part.files] for role in ("train", "val")}
    assert len(set(found["val"])) == 6
    assert sorted({*found["train"], *found["val"]}) == names
    assert not {*found["train"]} & {*found["val"]}
    for role in ("train", "val"):
        assert found[role] == sorted(found[role])


def test_parts_of_a_large_source_are_larger(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "PART_BYTES", 100)
    monkeypatch.setattr(module, "MAX_PARTS", 5)
    assert 3 <= len(cut(write_bytes(tmp_path / "t.jsonl", LINES))) <= 6
    assert 3 <= len(cut(write_folder(tmp_path / "folder"))) <= 7


def test_part_round_trips_through_json(tmp_path: Path) -> None:
    path = tmp_path / "caf\udce9\n.txt"
    part = Part("text", (("a", str(path)), ("b", "c")), 7, 1, 2, "val", continues=True)
    assert Part.from_json(json.loads(json.dumps(part.to_json()))) == part
    assert Part.from_json(json.loads(json.dumps(Part("hub", (), 0).to_json()))) == Part("hub", (), 0)


DOCUMENTS = [[15496, 995, index] for index in range(200)]
END = 50256
STREAM = [token for document in DOCUMENTS for token in [END, *document]]


def write_llm_c(path: Path) -> Path:
    header = struct.pack("<3i", 20240520, 1, len(STREAM)).ljust(1024, b"\0")
    return write_bytes(path, header + np.array(STREAM, "<u2").tobytes())


def write_npy(path: Path) -> Path:
    np.save(path, np.array(STREAM, np.int64))
    return path


def write_megatron(path: Path) -> Path:
    n = len(DOCUMENTS)
    header = b"MMIDIDX\0\0" + struct.pack("<QBQQ", 1, 8, n, n + 1)
    pointers = range(0, 6 * n, 6)
    write_bytes(
        path.with_suffix(".idx"), header + struct.pack(f"<{n}i{n}q{n + 1}q", *[3] * n, *pointers, *range(n + 1))
    )
    return write_bytes(path, np.array(DOCUMENTS, "<u2").tobytes())


@pytest.mark.parametrize(
    ("name", "write"),
    [
        ("nano.bin", lambda path: write_bytes(path, np.array(STREAM, "<u2").tobytes())),
        ("llm.bin", write_llm_c),
        ("tokens.npy", write_npy),
        ("m_text_document.bin", write_megatron),
    ],
)
def test_documents_of_token_files_do_not_depend_on_the_part_size(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, gpt2: Tokenizer, name: str, write: Callable[[Path], Path]
) -> None:
    source = write(tmp_path / name)
    length = {index: len(token) for token, index in decode_ranks(gpt2).items()}
    for size in (64, 500, 2**20):
        monkeypatch.setattr(module, "PART_BYTES", size)
        parts = cut(source, tokenizer=gpt2)
        documents = [document for part in parts for document in read_part(part, RECORDS, gpt2)]
        assert [document.encode(gpt2)[0].tolist() for document in documents] == DOCUMENTS
        assert [document.encode(gpt2)[1] for document in documents] == [sum(map(length.get, d)) for d in DOCUMENTS]
        assert len(parts) == 1 if size == 2**20 else len(parts) > 2
