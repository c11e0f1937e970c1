import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from gpt.data.tokenizer_builders import build_byte_tokenizer, build_tokenizer
from gpt.errors import UserError

DEFINITION = build_byte_tokenizer().definition


def change(**parts: Any) -> bytes:
    """Return a tokenizer.json with other parts."""
    return json.dumps(json.loads(DEFINITION) | parts).encode()


def refuse(path: Path) -> str:
    """Return the message with which a tokenizer is refused: one line that begins with its path."""
    with pytest.raises(UserError) as error:
        build_tokenizer(str(path))
    assert str(error.value).startswith(f"--data.tokenizer {path}: ")
    assert "\n" not in str(error.value)
    return str(error.value)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("tokenizer.model", b"\n\x0e\n\x05<unk>\x15\x00\x00\x00\x00\x18\x02", "a SentencePiece model; convert it"),
        ("renamed", b"\n\x0e\n\x05<unk>\x15\x00\x00\x00\x00\x18\x02", "a SentencePiece model; convert it"),
        ("o200k.tiktoken", b"IQ== 0\nIg== 1\n", "ranks of tiktoken; convert_tiktoken_to_fast"),
        ("merges.txt", b"#version: 0.2\nt h\n", "the merges alone; convert it"),
        ("vocab.txt", b"[PAD]\n[UNK]\nthe\n", "a list of tokens; convert it"),
        ("vocab.json", b'{"a": 0, "b": 1}', "a vocabulary alone; convert it"),
        ("tokenizer_config.json", b'{"eos_token": "</s>"}', "no 'model' in it; name the tokenizer.json"),
        ("t.json", b"[]", "no 'model' in it; name the tokenizer.json"),
        ("t.json", b'{"model": {', "not valid JSON: .* line 1 column .*; copy the file again"),
        ("t.json", b'{"a": "\xff"}', "not UTF-8 at byte 7; copy the file again"),
        ("t.json", DEFINITION.encode("utf-16"), "UTF-16; save it as UTF-8"),
        ("t.json", change(model={"type": "New", "vocab": {}}), "does not know its model 'New'; pip install -U"),
        ("t.json", change(pre_tokenizer={"type": "New"}), "does not know its pre_tokenizer 'New' .*; pip install -U"),
        (
            "t.json",
            change(decoder={"type": "Sequence", "decoders": [{"type": "Fuse"}, {"type": "New"}]}),
            "decoder 'New'",
        ),
        ("t.json", change(model={"type": "BPE", "vocab": {"a": 0}, "merges": ["a b"]}), "pip install -U tokenizers"),
    ],
)
def test_file_that_is_no_tokenizer_json_names_the_remedy(
    tmp_path: Path, name: str, content: bytes, message: str
) -> None:
    (tmp_path / name).write_bytes(content)
    text = refuse(tmp_path / name)
    assert "not a Hugging Face tokenizer.json" in text
    assert re.search(message, text), text


def test_byte_order_mark_is_no_part_of_the_tokenizer(tmp_path: Path) -> None:
    (tmp_path / "t.json").write_bytes(b"\xef\xbb\xbf" + DEFINITION.encode())
    assert build_tokenizer(str(tmp_path / "t.json")).definition == DEFINITION


@pytest.mark.parametrize(
    ("write", "message"),
    [
        (lambda folder: (folder / "tokenizer.json").write_text(DEFINITION), "name the file in it: .*tokenizer.json"),
        (lambda folder: (folder / "tokenizer.model").touch(), "a folder with tokenizer.model .* convert it"),
        (lambda folder: (folder / "x.tiktoken").touch(), "a folder with x.tiktoken .* convert_tiktoken_to_fast"),
        (lambda folder: (folder / "vocab.json").touch(), "a folder with vocab.json .* convert it"),
        (lambda folder: None, "a folder without a tokenizer.json"),
    ],
)
def test_folder_names_the_file_to_use(tmp_path: Path, write: Callable[[Path], None], message: str) -> None:
    write(tmp_path)
    text = refuse(tmp_path)
    assert re.search(message, text), text


def test_added_token_that_the_library_would_renumber_is_refused(tmp_path: Path) -> None:
    definition = json.loads(DEFINITION)
    definition["added_tokens"][0]["id"] = 5000
    (tmp_path / "t.json").write_text(json.dumps(definition))
    assert "has id 5000, but the library gives it id 256" in refuse(tmp_path / "t.json")
