import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from gpt.checkpoint import tensor_file
from gpt.checkpoint.tensor_file import read_tensors, write_tensors
from gpt.errors import UserError

TENSORS = {
    "h.0.weight": torch.arange(12.0).reshape(3, 4),
    "h.0.weight.step": torch.tensor(7.0),
    "half": torch.ones(3, dtype=torch.bfloat16),
    'é"\n': torch.ones(1, dtype=torch.float16),
    "ids": torch.arange(5),
    "empty": torch.zeros(0, 4),
    "flag": torch.tensor([True, False, True]),
    "bytes": torch.arange(5, dtype=torch.uint8),
    "double": torch.ones(2, dtype=torch.float64),
    "short": torch.ones(1, dtype=torch.int16),
}


@pytest.mark.parametrize("tensors", [TENSORS, {}, {"one": torch.zeros(())}])
def test_bytes_equal_those_of_the_library(tmp_path: Path, tensors: dict[str, torch.Tensor]) -> None:
    record = write_tensors(tmp_path / "ours", tensors)
    save_file(tensors, tmp_path / "theirs")
    content = (tmp_path / "theirs").read_bytes()
    assert (tmp_path / "ours").read_bytes() == content
    assert (record.size, record.sha256) == (len(content), hashlib.sha256(content).hexdigest())
    loaded = read_tensors(tmp_path / "ours")
    assert all(torch.equal(loaded[name], tensor) for name, tensor in tensors.items())


def test_a_tensor_longer_than_a_chunk_has_the_same_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tensor_file, "CHUNK_BYTES", 64)
    tensors = {"long": torch.randn(1000), "short": torch.randn(3)}
    write_tensors(tmp_path / "ours", tensors)
    save_file(tensors, tmp_path / "theirs")
    assert (tmp_path / "ours").read_bytes() == (tmp_path / "theirs").read_bytes()


def with_header(header: bytes, data: bytes = bytes(8), length: int | None = None) -> bytes:
    return (len(header) if length is None else length).to_bytes(8, "little") + header + data


def entry(**changes: Any) -> dict[str, Any]:
    return {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]} | changes


def as_json(**tensors: dict[str, Any]) -> bytes:
    return json.dumps(tensors).encode()


MALICIOUS: dict[str, Callable[[], bytes]] = {
    "a length of 2^63": lambda: with_header(as_json(a=entry()), length=2**63),
    "a length beyond the end": lambda: with_header(as_json(a=entry()), length=10_000),
    "a length of 0": lambda: with_header(b""),
    "nothing": lambda: b"",
    "half a length": lambda: b"\x01\x02",
    "overlap": lambda: with_header(as_json(a=entry(), b=entry(shape=[1], data_offsets=[4, 8]))),
    "a hole": lambda: with_header(as_json(a=entry(shape=[1], data_offsets=[4, 8]))),
    "a huge shape": lambda: with_header(as_json(a=entry(shape=[2**62, 2**62]))),
    "a negative shape": lambda: with_header(as_json(a=entry(shape=[-1]))),
    "offsets beyond the end": lambda: with_header(as_json(a=entry(shape=[200], data_offsets=[0, 800]))),
    "offsets of 2^64": lambda: with_header(as_json(a=entry(data_offsets=[0, 2**64]))),
    "trailing bytes": lambda: with_header(as_json(a=entry()), bytes(16)),
    "an unknown type": lambda: with_header(as_json(a=entry(dtype="PICKLE"))),
    "deep JSON": lambda: with_header(b"[" * 100_000),
    "deep JSON in an entry": lambda: with_header(b'{"a":' + b'{"a":' * 100_000),
    "duplicate names": lambda: with_header(b'{"a":%b,"a":%b}' % ((json.dumps(entry()).encode(),) * 2)),
    "a duplicate key": lambda: with_header(b'{"a":{"dtype":"F32","shape":[2],"shape":[2],"data_offsets":[0,8]}}'),
    "no object": lambda: with_header(b"[1]"),
    "not UTF-8": lambda: with_header(b'{"\xff":1}'),
    "a long number": lambda: with_header(b'{"a":' + b"9" * 10_000 + b"}"),
    "a pickle": lambda: b"\x80\x04\x95" + bytes(100),
    "a zip": lambda: b"PK\x03\x04" + bytes(100),
}


@pytest.mark.parametrize("case", MALICIOUS)
def test_a_malicious_file_is_refused_in_one_line(tmp_path: Path, case: str) -> None:
    path = tmp_path / "model.safetensors"
    path.write_bytes(MALICIOUS[case]())
    with pytest.raises(UserError, match=r"model\.safetensors: not a valid safetensors file: ") as error:
        read_tensors(path)
    assert "\n" not in str(error.value)
    assert len(str(error.value)) < 500
