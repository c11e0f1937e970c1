import hashlib
import json
import re
from pathlib import Path

import pytest

from gpt.errors import UserError
from gpt.utils.sealed_json import SealError, read_sealed_json, seal_json, verify_seal, write_sealed_json

CONTENT = {"format_version": 7, "name": 'é"\n', "nested": {"sha256": "0"}}


def read(path: Path) -> dict[str, object]:
    return read_sealed_json(path, format_version=7, remedy="make it again")


def test_sealed_json_is_json_that_ends_with_its_digest(tmp_path: Path) -> None:
    write_sealed_json(tmp_path / "a.json", CONTENT)
    text = (tmp_path / "a.json").read_text()
    sealed = text[: text.rindex(",")]
    digest = hashlib.sha256(sealed.encode()).hexdigest()
    assert text == f'{sealed},\n  "sha256": "{digest}"\n}}\n'
    assert read(tmp_path / "a.json") == json.loads(text) == CONTENT | {"sha256": digest}


def test_every_changed_or_missing_byte_is_found(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    write_sealed_json(path, CONTENT)
    valid = path.read_bytes()
    for place in range(len(valid)):
        for changed in (valid[:place], valid[:place] + bytes([valid[place] ^ 1]) + valid[place + 1 :]):
            path.write_bytes(changed)
            with pytest.raises(UserError, match=f"^{path}: (damaged: .*|format .* reads format 7); make it again$"):
                read(path)


def test_a_changed_text_is_reported_with_both_digests(tmp_path: Path) -> None:
    text = seal_json(CONTENT).replace('"format_version": 7', '"format_version":  7')
    found = hashlib.sha256(text[: text.rindex(",")].encode()).hexdigest()
    expected = json.loads(text)["sha256"]
    (tmp_path / "a.json").write_text(text)
    with pytest.raises(UserError, match=re.escape(f"damaged: SHA-256 {found} instead of '{expected}'; make it")):
        read(tmp_path / "a.json")


def test_a_key_after_the_digest_is_refused() -> None:
    text = seal_json(CONTENT).replace("\n}\n", ',\n  "name": "other"\n}\n')
    with pytest.raises(SealError, match="it does not end with its digest"):
        verify_seal(text, json.loads(text))


def test_a_missing_file_is_the_callers_to_explain(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        read(tmp_path / "a.json")
    with pytest.raises(UserError, match=r"cannot be read: Is a directory"):
        read(tmp_path)
