import gzip
import io
import pickle
import random
import struct
import tracemalloc
import zipfile
from collections.abc import Callable, Iterator
from itertools import accumulate, pairwise
from pathlib import Path

import numpy as np
import pytest

from gpt.data.prepare import token_files
from gpt.data.prepare.token_files import TokenFile, is_token_file, is_token_index, open_tokens
from gpt.errors import UserError

EOT = 50256
DOCUMENTS = [[464, 3290, 13], [198], [15496, 11, 995, 0, 50255], [5, 5, 5, 5]]
APPENDED = [token for document in DOCUMENTS for token in [*document, EOT]]  # as nanoGPT has it
PREPENDED = [token for document in DOCUMENTS for token in [EOT, *document]]  # as llm.c has it


def nano_gpt(path: Path, tokens: list[int] = APPENDED) -> Path:
    np.array(tokens, np.uint16).tofile(path)
    return path


def llm_c(path: Path, tokens: list[int] = PREPENDED, magic: int = 20240520, version: int = 1) -> Path:
    header = struct.pack("<3i", magic, version, len(tokens)).ljust(1024, b"\0")
    path.write_bytes(header + np.array(tokens, np.uint16 if magic == 20240520 else np.uint32).tobytes())
    return path


def llama(path: Path, tokens: list[int] = PREPENDED) -> Path:
    return llm_c(path, tokens, 20240801, 7)


def megatron(
    path: Path,
    sequences: list[list[int]] = DOCUMENTS,
    documents: list[int] | None = None,
    code: int = 4,
    letter: str = "i",
    *,
    modes: bool = False,
) -> Path:
    """Write the published layout, by struct alone."""
    width = struct.calcsize(letter)
    lengths = [len(sequence) for sequence in sequences]
    pointers = [0, *accumulate(width * length for length in lengths)][:-1]
    documents = list(range(len(sequences) + 1)) if documents is None else documents
    with path.with_suffix(".idx").open("wb") as file:
        file.write(b"MMIDIDX\0\0" + struct.pack("<QBQQ", 1, code, len(sequences), len(documents)))
        file.write(struct.pack(f"<{len(lengths)}i{len(pointers)}q", *lengths, *pointers))
        file.write(struct.pack(f"<{len(documents)}q", *documents))
        file.write(bytes(len(sequences)) if modes else b"")
    path.write_bytes(b"".join(struct.pack(f"<{len(sequence)}{letter}", *sequence) for sequence in sequences))
    return path


def npy(path: Path, tokens: list[int] = APPENDED) -> Path:
    with path.open("wb") as file:
        np.save(file, np.array(tokens, np.int64))
    return path


WRITERS: dict[str, Callable[[Path], Path]] = {
    "nano.bin": nano_gpt,
    "llm.bin": llm_c,
    "llama.bin": llama,
    "megatron_text_document.bin": megatron,
    "tokens.npy": npy,
}


def detect_tokens(path: Path) -> bool:
    return is_token_file(path, path.read_bytes()[:8192])


def read_documents(file: TokenFile, end_of_text: int | None = EOT) -> list[list[int]]:
    return [document.tolist() for document in file.documents(0, len(file.tokens), end_of_text)]


@pytest.mark.parametrize("name", WRITERS)
def test_every_format_gives_the_same_documents(tmp_path: Path, name: str) -> None:
    path = WRITERS[name](tmp_path / name)
    assert detect_tokens(path)
    file = open_tokens(path)
    assert isinstance(file.tokens, np.memmap)
    assert read_documents(file) == DOCUMENTS
    assert [end for _, end in file.find_ranges(1000, EOT)] == [len(file.tokens)]


@pytest.mark.parametrize("name", ["llm.bin", "llama.bin", "tokens.npy"])
def test_format_with_a_header_needs_no_suffix(tmp_path: Path, name: str) -> None:
    path = WRITERS[name](tmp_path / "fineweb_train_000001")
    assert detect_tokens(path)
    assert read_documents(open_tokens(path)) == DOCUMENTS


def test_index_is_no_source(tmp_path: Path) -> None:
    path = megatron(tmp_path / "m.bin")
    index = path.with_suffix(".idx")
    assert is_token_index(index, index.read_bytes())
    assert not detect_tokens(index)
    assert not is_token_index(path, path.read_bytes())
    with pytest.raises(UserError, match=rf"{index} is the index of a token file; name the file itself, {path}"):
        open_tokens(index)
    assert not is_token_index(tmp_path / "pack.idx", b"\xfftOc\0\0\0\2")  # git's


def archive() -> bytes:
    with io.BytesIO() as buffer, zipfile.ZipFile(buffer, "w") as file:
        file.writestr("weights", b"\0" * 100)
        file.close()
        return buffer.getvalue()


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("text.bin", "Käse, only text".encode()),
        ("cut.bin", ("é" * 5000).encode()[:8191]),
        ("text.bin", gzip.compress(b"text" * 100)),
        ("weights.bin", archive()),
        ("data.txt", np.array(APPENDED, np.uint16).tobytes()),
        ("empty.bin", b""),
        ("gpt2_124M.bin", struct.pack("<3i", 20240326, 3, 1024).ljust(2048, b"\0")),
    ],
)
def test_other_files_are_not_token_files(tmp_path: Path, name: str, content: bytes) -> None:
    (tmp_path / name).write_bytes(content)
    assert not detect_tokens(tmp_path / name)
    with pytest.raises(UserError, match=rf"{tmp_path / name}: .*; name "):
        open_tokens(tmp_path / name)


def test_raw_tokens_are_recognised_by_content_that_is_no_text(tmp_path: Path) -> None:
    assert detect_tokens(nano_gpt(tmp_path / "hello.bin", [15496, 995]))  # 88 3c e3 03: no NUL, but not UTF-8
    assert detect_tokens(nano_gpt(tmp_path / "char.bin", [1, 2, 3]))


def test_megatron_file_is_recognised_by_its_index(tmp_path: Path) -> None:
    path = megatron(tmp_path / "m.bin", [[72, 101], [108]], code=1, letter="B")
    assert detect_tokens(path)
    assert read_documents(open_tokens(path)) == [[72, 101], [108]]


@pytest.mark.parametrize(("code", "letter"), [(1, "B"), (2, "b"), (3, "h"), (4, "i"), (5, "q"), (8, "H"), (9, "I")])
def test_every_dtype_of_megatron(tmp_path: Path, code: int, letter: str) -> None:
    path = megatron(tmp_path / "m.bin", [[1, 2], [100]], code=code, letter=letter)
    assert read_documents(open_tokens(path)) == [[1, 2], [100]]


@pytest.mark.parametrize("modes", [False, True])
def test_megatron_documents_consist_of_sequences_and_may_be_empty(tmp_path: Path, modes: bool) -> None:
    sequences = [[1, 2], [3], [], [4, 5, 6], [7]]
    path = megatron(tmp_path / "m.bin", sequences, [0, 0, 2, 3, 3, 5, 5], modes=modes)
    file = open_tokens(path)
    assert file.starts is not None and file.starts.tolist() == [0, 3]
    assert read_documents(file, None) == [[1, 2, 3], [4, 5, 6, 7]]


def test_end_of_text_is_stripped_at_the_edges_of_documents_only(tmp_path: Path) -> None:
    path = megatron(tmp_path / "m.bin", [[9, 9, 1, 9, 2, 9], [9], [3]])
    assert read_documents(open_tokens(path), 9) == [[1, 9, 2], [3]]
    assert read_documents(open_tokens(path), None) == [[9, 9, 1, 9, 2, 9], [9], [3]]


def test_file_is_one_document_without_an_end_of_text_token(tmp_path: Path) -> None:
    file = open_tokens(nano_gpt(tmp_path / "a.bin"))
    assert read_documents(file, None) == [APPENDED]
    assert read_documents(file, 100_257) == [APPENDED]  # beyond what the type can hold
    assert [d.tolist() for d in file.documents(2, 6, EOT)] == [[13], [198]]


def test_npy_may_be_big_endian(tmp_path: Path) -> None:
    np.save(tmp_path / "big.npy", np.array(APPENDED, ">u2"))
    assert read_documents(open_tokens(tmp_path / "big.npy")) == DOCUMENTS


def test_first_id_outside_the_vocabulary_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(token_files, "SCAN_TOKENS", 4)
    path = llama(tmp_path / "a.bin", [1, 2, 3, 4, 5, 50256, 70000, 80000])
    file = open_tokens(path)
    file.check_ids(0, 8, 80001)
    file.check_ids(0, 6, 50257)
    message = (
        rf"^{path}: token 70000 at offset 6 is not in the vocabulary of 50257; "
        r"set --data\.tokenizer to the tokenizer that wrote the file$"
    )
    with pytest.raises(UserError, match=message):
        file.check_ids(1, 8, 50257)
    with pytest.raises(UserError, match="token 80000 at offset 7 "):
        file.check_ids(7, 8, 50257)
    negative = npy(tmp_path / "n.npy", [1, 2, -1])
    with pytest.raises(UserError, match="token -1 at offset 2 "):
        open_tokens(negative).check_ids(0, 3, 50257)


def test_ranges_begin_at_documents(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(token_files, "SCAN_TOKENS", 2)
    file = open_tokens(nano_gpt(tmp_path / "a.bin", [9, 1, 1, 1, 9, 2, 9, 3, 3, 3, 3, 3]))
    assert file.find_ranges(3, 9) == [(0, 4), (4, 7), (7, 10), (10, 12)]  # none begins after 7
    assert file.find_ranges(2, 9) == [(0, 4), (4, 6), (6, 8), (8, 10), (10, 12)]
    assert file.find_ranges(4, None) == [(0, 4), (4, 8), (8, 12)]
    assert file.find_ranges(12, 9) == file.find_ranges(99, 9) == [(0, 12)]
    appended = open_tokens(nano_gpt(tmp_path / "b.bin", [1, 1, 9, 2, 2, 2, 9]))
    assert appended.find_ranges(3, 9) == [(0, 7)]  # no part of nothing but the last 9
    known = open_tokens(megatron(tmp_path / "m.bin", [[1], [2] * 5, [3], [4], [5], [6]]))
    assert known.find_ranges(2, None) == [(0, 6), (6, 8), (8, 10)]


def test_search_for_a_document_start_is_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(token_files, "SCAN_TOKENS", 4)
    monkeypatch.setattr(token_files, "MAX_SEARCH_TOKENS", 10)
    file = open_tokens(nano_gpt(tmp_path / "a.bin", [1] * 29 + [9] + [1] * 20))
    assert file.find_ranges(15, 9) == [(0, 15), (15, 30), (30, 45), (45, 50)]
    assert file.find_ranges(20, 9) == [(0, 29), (29, 49), (49, 50)]


@pytest.mark.parametrize("write", [nano_gpt, llama, npy])
def test_ranges_together_have_the_documents_of_the_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, write: Callable[[Path, list[int]], Path]
) -> None:
    monkeypatch.setattr(token_files, "SCAN_TOKENS", 16)
    draw = random.Random(1)
    documents = [[draw.randrange(1, 300) for _ in range(draw.randrange(1, 40))] for _ in range(100)]
    file = open_tokens(write(tmp_path / "a.bin", [token for d in documents for token in [0, *d]]))
    known = open_tokens(megatron(tmp_path / "m.bin", documents))
    for part_tokens in (1, 7, 100, 1000, 10_000):
        for tokens in (file, known):
            cuts = tokens.find_ranges(part_tokens, 0)
            assert cuts[0][0] == 0 and cuts[-1][1] == len(tokens.tokens)
            assert all(first[1] == second[0] for first, second in pairwise(cuts))
            assert all(stop - start >= part_tokens for start, stop in cuts[:-1])
            assert [d.tolist() for start, stop in cuts for d in tokens.documents(start, stop, 0)] == documents


def test_large_file_is_mapped_and_not_read(tmp_path: Path) -> None:
    path = tmp_path / "large.bin"
    with path.open("wb") as file:
        file.truncate(2**34)  # a hole: takes no room on the disk
    tracemalloc.start()
    try:
        tokens = open_tokens(path)
        assert tokens.find_ranges(2**31, EOT) == [(i * 2**31, (i + 1) * 2**31) for i in range(4)]
        assert tracemalloc.get_traced_memory()[1] < 2**24
    finally:
        tracemalloc.stop()


# Damage: who writes the file, what is done to it, what is said.


def change_file(path: Path, change: Callable[[bytearray], object]) -> Path:
    content = bytearray(path.read_bytes())
    change(content)
    path.write_bytes(content)
    return path


def put_number(offset: int, form: str, value: int) -> Callable[[bytearray], object]:
    return lambda content: struct.pack_into(form, content, offset, value)


def truncate(size: int) -> Callable[[bytearray], object]:
    return lambda content: content.__delitem__(slice(size, None))


def append(more: bytes) -> Callable[[bytearray], object]:
    return lambda content: content.extend(more)


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("nano.bin", append(b"\0"), r"35 bytes are not a whole number of uint16 tokens; copy"),
        ("nano.bin", truncate(0), r"the file is empty; name one with tokens in it"),
        ("llm.bin", truncate(100), r"100 bytes are less than llm\.c's header of 1024"),
        ("llm.bin", put_number(4, "<i", 2), r"llm\.c's format 20240520 in version 2; save it in version 1"),
        ("llama.bin", put_number(4, "<i", 1), r"llm\.c's format 20240801 in version 1; save it in version 7"),
        ("llm.bin", append(b"\0\0"), r"1060 bytes, but its header says 17 tokens in 1058 bytes; copy"),
        ("llm.bin", truncate(1050), r"1050 bytes, but its header says 17 tokens in 1058 bytes"),
        ("llm.bin", put_number(8, "<i", -1), r"1058 bytes, but its header says -1 tokens"),
        ("llama.bin", truncate(1050), r"1050 bytes, but its header says 17 tokens in 1092 bytes"),
        ("llm.bin", put_number(0, "<i", 20240522), r"the evaluation of llm\.c"),
        ("tokens.npy", truncate(200), r"mmap length is greater than file ?size; save it again"),
        ("tokens.npy", append(b"\0"), r"265 bytes, but its header says 17 tokens in 264 bytes"),
        ("megatron_text_document.bin", truncate(0), r"the file is empty"),
    ],
)
def test_damage_is_reported(tmp_path: Path, name: str, change: Callable[[bytearray], object], message: str) -> None:
    path = change_file(WRITERS[name](tmp_path / name), change)
    with pytest.raises(UserError, match=rf"^{path}: {message}"):
        open_tokens(path)


# Offsets in the index: 9 version, 17 type, 18 sequences, 26 documents, 34 lengths, 50 pointers, 82 documents.
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (truncate(0), r"is beside m\.bin but is no index of Megatron's"),
        (put_number(0, "<B", 0), r"is beside m\.bin but is no index of Megatron's"),
        (truncate(20), r"20 bytes are less than its header of 34"),
        (truncate(121), r"121 bytes, but its header says 4 sequences and 5 entries of documents in 122 bytes; copy"),
        (append(b"\0"), r"123 bytes, but its header says"),
        (put_number(18, "<Q", 2**60), r"122 bytes, but its header says 1152921504606846976 sequences"),
        (put_number(26, "<Q", 2**63), r"122 bytes, but its header says 4 sequences and 9223372036854775808 entries"),
        (put_number(9, "<Q", 2), r"version 2, type 4"),
        (put_number(17, "<B", 11), r"version 1, type 11; save it in version 1 as integers"),
        (put_number(17, "<B", 6), r"version 1, type 6; save it in version 1 as integers"),
        (put_number(17, "<B", 8), r"lengths add up to 13 tokens of 2 bytes, but m\.bin has 52 bytes; copy both"),
        (put_number(34, "<i", 4), r"lengths add up to 14 tokens of 4 bytes, but m\.bin has 52 bytes"),
        (lambda c: struct.pack_into("<2i", c, 34, -3, 7), r"lengths add up to 13 tokens of 4 bytes, but"),
        (put_number(58, "<q", 8), r"pointers and lengths of the sequences disagree"),
        (put_number(82, "<q", 1), r"the document index does not ascend from 0 to 4 sequences"),
        (put_number(90, "<q", 3), r"the document index does not ascend from 0 to 4 sequences"),
        (put_number(90, "<q", -1), r"the document index does not ascend from 0 to 4 sequences"),
        (put_number(98, "<q", 5), r"the document index does not ascend from 0 to 4 sequences"),
        (put_number(114, "<q", 3), r"the document index does not ascend from 0 to 4 sequences"),
    ],
)
def test_damage_of_an_index_is_reported(tmp_path: Path, change: Callable[[bytearray], object], message: str) -> None:
    path = megatron(tmp_path / "m.bin")
    index = change_file(path.with_suffix(".idx"), change)
    with pytest.raises(UserError, match=rf"^{index}: {message}"):
        open_tokens(path)


def test_index_without_documents_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="document index does not ascend from 0 to 4"):
        open_tokens(megatron(tmp_path / "m.bin", documents=[]))


@pytest.mark.parametrize("dtype", ["<i4", "<i8"])
@pytest.mark.parametrize("vocab_size", [65, 50257, 128_256])
def test_missing_index_is_noticed_for_32_bit_ids(tmp_path: Path, dtype: str, vocab_size: int) -> None:
    ids = np.random.default_rng(0).integers(0, vocab_size, 2000)
    ids.astype(dtype).tofile(tmp_path / "m.bin")
    with pytest.raises(UserError, match=r"m\.bin: seems to hold 32-bit ids; copy Megatron's m\.idx beside it"):
        open_tokens(tmp_path / "m.bin")
    if vocab_size < 2**16:
        ids.astype("<u2").tofile(tmp_path / "m.bin")
        assert open_tokens(tmp_path / "m.bin").tokens.tolist() == ids.tolist()


class Trap:
    """An object whose code runs when a pickle is read."""

    def __reduce__(self) -> tuple[Callable[[str], object], tuple[str]]:
        return pytest.fail, ("unpickled",)


def npy_header(header: str, data: bytes = b"\1\0\2\0") -> bytes:
    return b"\x93NUMPY\1\0" + struct.pack("<H", len(header)) + header.encode() + data


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (
            npy_header("{'descr': '|O', 'fortran_order': False, 'shape': (1,), }", pickle.dumps(Trap())),
            "Python objects",
        ),
        (npy_header("{'descr': '<f4', 'fortran_order': False, 'shape': (1,), }"), r"shape \(1,\) of float32; save"),
        (npy_header("{'descr': '<u2', 'fortran_order': False, 'shape': (1, 2), }"), r"shape \(1, 2\) of uint16"),
        (npy_header("{'descr': '<u2', 'fortran_order': False, 'shape': (), }", b"\1\0"), r"shape \(\) of uint16"),
        (npy_header("{'descr': '<m8[s]', 'fortran_order': False, 'shape': (1,), }", bytes(8)), "timedelta"),
        (npy_header("{'descr': '|b1', 'fortran_order': False, 'shape': (4,), }"), "of bool"),
        (npy_header("{'descr': [('a', '<u2')], 'fortran_order': False, 'shape': (2,), }"), "shape"),
        (npy_header("{'descr': '<u2', 'fortran_order': False, 'shape': (0,), }", b""), ""),
        (npy_header("{'descr': '<u2', 'fortran_order': False, 'shape': (-1,), }"), ""),
        (npy_header(f"{{'descr': '<u2', 'fortran_order': False, 'shape': ({2**62},), }}"), ""),
        (npy_header(f"{{'descr': '<u2', 'fortran_order': False, 'shape': ({2**63},), }}"), ""),
        (npy_header(f"{{'descr': '<u2', 'fortran_order': False, 'shape': ({10**40},), }}"), ""),
        (npy_header("(" * 9000), ""),
        (npy_header("-" * 9000 + "1"), ""),
        (npy_header("'\\d' 1L"), ""),
        (npy_header("{'a': [" * 3 + "\n  \n 'b"), ""),
        (npy_header(" " * 20_000), "damaged: a header of 20000 bytes; copy it again"),
        (b"\x93NUMPY\2\0\xff\xff\xff\xff{}", "damaged: a header of 4294967295 bytes; copy it again"),
        (b"\x93NUMPY\x09\0\0\0\0\0", ""),
        (b"\x93NUMPY", ""),
    ],
)
def test_npy_without_tokens_is_refused(tmp_path: Path, content: bytes, message: str) -> None:
    path = tmp_path / "a.npy"
    path.write_bytes(content)
    with pytest.raises(UserError, match=rf"^{path}: .*{message}") as caught:
        open_tokens(path)
    assert "\n" not in str(caught.value)


def test_unreadable_file_is_reported(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"none\.bin: cannot be read: No such file"):
        open_tokens(tmp_path / "none.bin")
    (tmp_path / "folder.bin").mkdir()
    with pytest.raises(UserError, match=r"folder\.bin: cannot be read: Is a directory"):
        open_tokens(tmp_path / "folder.bin")


def mutate(content: bytes, n: int, seed: str) -> Iterator[bytes]:
    """Cut at every byte of the header, then bytes replaced at random, mostly early ones."""
    draw = random.Random(seed)
    for size in range(min(len(content), 140)):
        yield content[:size]
    for _ in range(n):
        changed = bytearray(content)
        for _ in range(draw.choice([1, 1, 2, 4])):
            at = draw.randrange(draw.choice([16, 64, 128, len(content)]))
            changed[at % len(content)] = draw.choice([0, 1, 255, draw.randrange(256)])
        yield bytes(changed)


@pytest.mark.parametrize("name", WRITERS)
@pytest.mark.parametrize("suffix", [".bin", ".idx", ".npy"])
def test_any_content_is_read_or_refused(tmp_path: Path, name: str, suffix: str) -> None:
    path = WRITERS[name](tmp_path / name)
    target = path.with_suffix(suffix)
    if not target.exists():
        return
    opened = 0
    tracemalloc.start()
    try:
        for content in mutate(target.read_bytes(), 400, name):
            target.unlink()  # a mapped file is not to be cut under its map
            target.write_bytes(content)
            tracemalloc.reset_peak()
            before = tracemalloc.get_traced_memory()[0]
            try:
                is_token_file(path, path.read_bytes())
                file = open_tokens(path)
            except UserError as error:
                assert "\n" not in str(error)
                assert str(tmp_path) in str(error)
            else:
                opened += 1
                assert_valid(file)
            assert tracemalloc.get_traced_memory()[1] - before < 2**20
    finally:
        tracemalloc.stop()
    assert opened > 5


def assert_valid(file: TokenFile) -> None:
    n_tokens = len(file.tokens)
    assert file.tokens.ndim == 1 and n_tokens > 0 and file.tokens.dtype.kind in "iu"
    if file.starts is not None:
        starts = file.starts.tolist()
        assert starts[0] == 0 and starts[-1] < n_tokens and starts == sorted(set(starts))
    assert sum(stop - start for start, stop in file.find_ranges(5, EOT)) == n_tokens
    assert sum(map(len, read_documents(file, None))) == n_tokens
    assert EOT not in [token for document in read_documents(file) for token in (document[0], document[-1])]
    expected = bool(((file.tokens >= 50257) | (file.tokens < 0)).any())
    try:
        file.check_ids(0, n_tokens, 50257)
    except UserError:
        assert expected
    else:
        assert not expected
