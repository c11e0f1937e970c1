import json
from pathlib import Path
from typing import Any

import pytest

from gpt.data.chat_template import find_chat_template
from gpt.errors import UserError
from tests.data.chat_templates import CHATML, SPECIAL_TOKENS, TURNS, build_chat_template, write_tokenizer_folder


def test_saved_template_is_found_again_byte_for_byte(tmp_path: Path) -> None:
    template = build_chat_template("turns")
    template.save(tmp_path)
    assert (tmp_path / "chat_template.jinja").read_bytes() == TURNS.encode()
    assert find_chat_template(tmp_path) == template


def test_template_in_tokenizer_config_is_found(tmp_path: Path) -> None:
    assert find_chat_template(write_tokenizer_folder(tmp_path)) == build_chat_template()


def test_template_in_a_file_of_its_own_comes_first(tmp_path: Path) -> None:
    write_tokenizer_folder(tmp_path)
    (tmp_path / "chat_template.jinja").write_text(TURNS)
    assert find_chat_template(tmp_path) == build_chat_template("turns")


def test_default_of_several_templates_is_found(tmp_path: Path) -> None:
    several = [{"name": "tool_use", "template": TURNS}, {"name": "default", "template": CHATML}]
    write_tokenizer_folder(tmp_path, chat_template=several)
    assert find_chat_template(tmp_path) == build_chat_template()
    write_tokenizer_folder(tmp_path, chat_template=several[:1])
    assert find_chat_template(tmp_path) is None


def test_special_tokens_of_their_own_file_come_first(tmp_path: Path) -> None:
    write_tokenizer_folder(tmp_path, bos_token=None, unk_token="<other>")
    (tmp_path / "special_tokens_map.json").write_text(json.dumps({"bos_token": {"content": "<s>"}, "extra": ["x"]}))
    template = find_chat_template(tmp_path)
    assert template is not None and template.special_tokens == SPECIAL_TOKENS | {"unk_token": "<other>"}


def test_folder_without_a_template_has_none(tmp_path: Path) -> None:
    assert find_chat_template(tmp_path) is None
    write_tokenizer_folder(tmp_path, chat_template=None)
    assert find_chat_template(tmp_path) is None


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("tokenizer_config.json", b'{"chat_template": 3}', "tokenizer_config.json: chat_template 3 is not a text"),
        ("tokenizer_config.json", b"{", "tokenizer_config.json: not valid JSON"),
        ("chat_template.jinja", b"\xff", "chat_template.jinja: cannot be read: .*; mend or remove it"),
    ],
)
def test_damaged_file_is_one_line(tmp_path: Path, file: str, content: Any, message: str) -> None:
    (tmp_path / file).write_bytes(content)
    with pytest.raises(UserError, match=message) as caught:
        find_chat_template(tmp_path)
    assert "\n" not in str(caught.value)
