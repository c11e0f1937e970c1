"""Conversations over HTTP, with the real openai client."""

import json
from collections.abc import Iterator
from typing import Any

import pytest

pytest.importorskip("fastapi", reason="needs the extra serve")
pytest.importorskip("openai", reason="needs openai")

import httpx
import openai

from gpt.configs.observer_config import SampleConfig
from gpt.inference.chat import ChatEncoder
from gpt.inference.language_model import LanguageModel
from tests.data.chat_templates import build_chat_template, build_chat_tokenizer
from tests.inference.families import build_config
from tests.inference.test_kv_cache import build_model
from tests.serving.test_api import connect, serve

TOKENIZER, TEMPLATE = build_chat_tokenizer(), build_chat_template("turns")
MODEL = LanguageModel(
    build_model(build_config("qwen3", vocab_size=TOKENIZER.vocab_size, block_size=128)),
    TOKENIZER,
    chat_template=TEMPLATE,
)
MESSAGES = [
    {"role": "system", "content": "Obey."},
    {"role": "user", "content": [{"type": "text", "text": "the "}, {"type": "text", "text": "model"}]},
]
PLAIN = [{"role": "system", "content": "Obey."}, {"role": "user", "content": "the model"}]


@pytest.fixture(scope="module")
def url() -> Iterator[str]:
    with serve(MODEL) as (url, _):
        yield url


@pytest.fixture(scope="module")
def client(url: str) -> Iterator[Any]:
    with connect(url) as client:
        yield client


def generate(max_new_tokens: int, seed: int) -> str:
    """Return the turn that Python generates after the same ids."""
    ids = ChatEncoder(TOKENIZER, TEMPLATE).encode(PLAIN)
    config = SampleConfig(max_new_tokens=max_new_tokens, temperature=0.8)
    return "".join(piece for _, piece in MODEL.run([MODEL.build_completion(ids, config, seed)]))


def test_openai_client_gets_the_turn_that_python_gets(client: Any) -> None:
    answer = client.chat.completions.create(
        model="tiny", messages=MESSAGES, max_completion_tokens=12, temperature=0.8, seed=3, n=2
    )
    assert answer.object == "chat.completion" and answer.id.startswith("chatcmpl-")
    assert [choice.message.content for choice in answer.choices] == [generate(12, 3), generate(12, 4)]
    assert {choice.message.role for choice in answer.choices} == {"assistant"}
    assert {choice.finish_reason for choice in answer.choices} == {"length"}
    n_prompt = len(ChatEncoder(TOKENIZER, TEMPLATE).encode(PLAIN))
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens) == (n_prompt, 24)


def test_stream_is_the_whole_answer_in_pieces(client: Any) -> None:
    request = {"model": "tiny", "messages": PLAIN, "max_tokens": 16, "seed": 5, "logprobs": True, "top_logprobs": 2}
    chunks = list(client.chat.completions.create(stream=True, stream_options={"include_usage": True}, **request))
    (answer,) = client.chat.completions.create(**request).choices
    pieces = [chunk.choices[0] for chunk in chunks[:-1]]
    assert {chunk.object for chunk in chunks} == {"chat.completion.chunk"}
    assert [piece.delta.role for piece in pieces] == ["assistant", *[None] * (len(pieces) - 1)]
    assert "".join(piece.delta.content for piece in pieces) == answer.message.content
    assert len(pieces) > 5
    assert [piece.finish_reason for piece in pieces] == [*[None] * (len(pieces) - 1), answer.finish_reason]
    assert chunks[-1].choices == [] and chunks[-1].usage.completion_tokens == len(answer.logprobs.content)
    positions = [position for piece in pieces for position in piece.logprobs.content]
    assert positions == answer.logprobs.content
    settled = bytes(byte for each in positions for byte in each.bytes).decode()
    assert answer.message.content in (settled, settled + "\ufffd")  # a text may end inside a character
    assert all(len(each.top_logprobs) == 2 and each.logprob <= each.top_logprobs[0].logprob for each in positions)


def test_turn_may_fill_the_context(client: Any) -> None:
    answer = client.chat.completions.create(model="tiny", messages=PLAIN, seed=1, temperature=0)
    assert answer.usage.total_tokens > 100
    assert answer.choices[0].finish_reason in ("stop", "length")


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ({}, "messages: Field required"),
        ({"messages": []}, "messages: List should have at least 1 item"),
        ({"messages": [{"role": "user"}]}, "messages: Field required"),
        ({"messages": [{"role": "tool", "content": "a"}]}, "messages: Input should be 'system'"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": "x"}]}]}, "messages: "),
        ({"messages": PLAIN, "prompt": "a"}, "unknown field 'prompt'"),
        ({"messages": PLAIN, "tools": [{}]}, "unknown field 'tools'"),
        ({"messages": PLAIN, "top_logprobs": 1}, "top_logprobs needs logprobs true"),
        ({"messages": PLAIN, "max_tokens": 0}, "max_tokens"),
        ({"messages": [{"role": "user", "content": "\ud800"}]}, "not valid Unicode text"),
        ({"messages": [{"role": "assistant", "content": "a"}]}, "refuses these messages: roles must alternate"),
        ({"messages": [{"role": "user", "content": "a" * 200}]}, "messages: "),
    ],
)
def test_bad_body_is_answered_in_openai_format(url: str, body: dict[str, Any], message: str) -> None:
    content, headers = json.dumps(body), {"Content-Type": "application/json"}  # escaped, so that any text can be sent
    answer = httpx.post(f"{url}/v1/chat/completions", content=content, headers=headers, timeout=60)
    error = answer.json()["error"]
    assert answer.status_code == 400
    assert message in error["message"] and "\n" not in error["message"]
    assert error.keys() == {"message", "type", "param", "code"}


def test_model_without_a_template_names_the_other_path() -> None:
    with serve() as (url, _), connect(url) as client:
        with pytest.raises(openai.BadRequestError, match=r"has no chat template, .*; use /v1/completions") as caught:
            client.chat.completions.create(model="tiny", messages=PLAIN)
        assert caught.value.code == "no_chat_template"
        with pytest.raises(openai.NotFoundError, match="the model 'gpt-4' does not exist"):
            client.chat.completions.create(model="gpt-4", messages=PLAIN)
