"""Chat templates in the styles of published models, and a small tokenizer with their special tokens."""

import json
from pathlib import Path
from typing import Any

import tokenizers

from gpt.data.chat_template import ChatTemplate
from gpt.data.tokenizer import Tokenizer
from gpt.data.tokenizer_builders import train_bpe_tokenizer
from tests.conftest import make_text
from tests.data.tokenizer_families import add_tokens

CHATML = """\
{%- if messages[0]['role'] != 'system' -%}
    {{- '<|im_start|>system\\nYou are helpful.<|im_end|>\\n' -}}
{%- endif -%}
{%- for message in messages -%}
    {{- '<|im_start|>' + message.role + '\\n' + message.content | trim + '<|im_end|>\\n' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<|im_start|>assistant\\n' -}}{%- endif -%}
"""
TURNS = """\
{% if messages[0]['role'] == 'system' %}
    {% set system = '<<SYS>>' + messages[0]['content'] + '<</SYS>>' %}
    {% set messages = messages[1:] %}
{% endif %}
{% for message in messages %}
    {% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}
        {{ raise_exception('roles must alternate user/assistant') }}
    {% endif %}
    {% if message['role'] == 'user' %}
        {{ bos_token + '[INST] ' + (system if loop.first and system is defined else '') + message['content'] }} [/INST]
    {% else %}
        {% generation %} {{ message['content'] }}{{ eos_token }}{% endgeneration %}
    {% endif %}
{% endfor %}
"""
FUNCTIONS = """\
{% set state = namespace(count=0) %}
{{ bos_token }}{{ strftime_now('%Y') }}
{% for message in messages %}
{% if message.role == 'developer' %}{% continue %}{% endif %}
{% set state.count = state.count + 1 %}
{{ state.count }} {{ message | tojson }} {{ {'b': '<ü>', 'a': 1} | tojson(indent=2, sort_keys=true) }}
{% if state.count == 2 %}{% break %}{% endif %}
{% endfor %}
{% if tools is not none or documents is not none %}unexpected{% endif %}
"""
TEMPLATES = {"chatml": CHATML, "turns": TURNS, "functions": FUNCTIONS}
SPECIAL_TOKENS = {"bos_token": "<s>", "eos_token": "<|im_end|>", "pad_token": "<|endoftext|>"}


def build_chat_tokenizer() -> Tokenizer:
    """Return a byte-level BPE with the special tokens of the templates."""
    library = tokenizers.Tokenizer.from_str(train_bpe_tokenizer([make_text(500)], 280).definition)
    return Tokenizer(add_tokens(library, ["<s>", "<|im_start|>", "<|im_end|>"]).to_str())


def build_chat_template(name: str = "chatml") -> ChatTemplate:
    """Return one of the templates with its special tokens."""
    return ChatTemplate(TEMPLATES[name], SPECIAL_TOKENS)


def write_tokenizer_folder(folder: Path, name: str = "chatml", **settings: Any) -> Path:
    """Write the files of a chat model's tokenizer, as transformers 4 wrote them."""
    folder.mkdir(exist_ok=True)
    (folder / "tokenizer.json").write_text(build_chat_tokenizer().definition)
    flags = dict.fromkeys(("lstrip", "normalized", "rstrip", "single_word"), False)
    name_of_end = {"__type": "AddedToken", "content": SPECIAL_TOKENS["eos_token"], "special": True, **flags}
    tokens = SPECIAL_TOKENS | {"eos_token": name_of_end}
    content = {"tokenizer_class": "PreTrainedTokenizerFast", "chat_template": TEMPLATES[name], **tokens}
    (folder / "tokenizer_config.json").write_text(json.dumps(content | settings))
    return folder
