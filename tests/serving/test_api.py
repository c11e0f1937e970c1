"""The server as its clients see it: the real openai client, many streams, clients that leave, bad bodies."""

import asyncio
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest

pytest.importorskip("fastapi", reason="needs the extra serve")
pytest.importorskip("openai", reason="needs openai")

import httpx
import openai
import uvicorn

from gpt.data.tokenizer_builders import build_byte_tokenizer
from gpt.inference.language_model import LanguageModel
from gpt.serving.api import MAX_BODY_BYTES, build_app
from gpt.serving.engine import Engine
from gpt.serving.metrics import Metrics
from tests.inference.families import build_config
from tests.inference.test_kv_cache import build_model

MODEL = LanguageModel(
    build_model(build_config("llama, grouped heads", vocab_size=257, block_size=128)), build_byte_tokenizer()
)


@contextmanager
def serve(model: LanguageModel = MODEL, api_key: str = "", **settings: Any) -> Iterator[tuple[str, Engine]]:
    """Serve on a free port; yield the URL and the engine."""
    engine = Engine(model, metrics=Metrics(), **({"max_batch": 8, "max_queue": 300, "timeout": 60.0} | settings))
    listener = socket.create_server(("127.0.0.1", 0), backlog=512)
    server = uvicorn.Server(uvicorn.Config(build_app(engine, "tiny", api_key=api_key), log_level="error"))
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
    engine.start()
    thread.start()
    try:
        yield f"http://127.0.0.1:{listener.getsockname()[1]}", engine
    finally:
        server.should_exit = True
        thread.join()
        engine.stop(grace_seconds=0)
        listener.close()


@pytest.fixture(scope="module")
def url() -> Iterator[str]:
    with serve() as (url, _):
        yield url


@pytest.fixture(scope="module")
def client(url: str) -> Iterator[Any]:
    with connect(url) as client:
        yield client


def connect(url: str, api_key: str = "none") -> Any:
    return openai.OpenAI(base_url=f"{url}/v1", api_key=api_key, max_retries=0, timeout=60)


def wait_until(condition: Any, seconds: float = 30.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_openai_client_gets_the_text_that_python_gets(client: Any) -> None:
    assert [model.id for model in client.models.list()] == ["tiny"]
    answer = client.completions.create(model="tiny", prompt="the", max_tokens=20, temperature=0.8, seed=3)
    assert answer.choices[0].text == MODEL.generate("the", max_new_tokens=20, temperature=0.8, seed=3)
    assert answer.choices[0].finish_reason == "length"
    assert answer.usage.model_dump(exclude_none=True) == {
        "prompt_tokens": 3,
        "completion_tokens": 20,
        "total_tokens": 23,
    }


def test_stream_is_the_whole_answer_in_pieces(client: Any) -> None:
    request = {"model": "tiny", "prompt": "the", "max_tokens": 30, "seed": 5, "logprobs": 2}
    chunks = list(client.completions.create(stream=True, stream_options={"include_usage": True}, **request))
    answer = client.completions.create(**request)
    pieces = [chunk.choices[0] for chunk in chunks[:-1]]
    assert "".join(piece.text for piece in pieces) == answer.choices[0].text
    assert len(pieces) > 5
    assert pieces[-1].finish_reason == answer.choices[0].finish_reason in ("stop", "length")
    assert chunks[-1].usage == answer.usage
    logprobs = answer.choices[0].logprobs
    assert len(logprobs.token_logprobs) == len(logprobs.top_logprobs) == answer.usage.completion_tokens
    assert [value for piece in pieces for value in piece.logprobs.token_logprobs] == logprobs.token_logprobs
    assert all(len(top) <= 2 for top in logprobs.top_logprobs)


def test_several_prompts_and_completions_have_their_own_seeds(client: Any) -> None:
    expected = [
        MODEL.generate(prompt, max_new_tokens=12, temperature=1.0, seed=7 + index)
        for index, prompt in enumerate(["the", "the", "ab", "ab"])
    ]
    for prompt in (["the", "ab"], [list(b"the"), list(b"ab")]):
        answer = client.completions.create(model="tiny", prompt=prompt, n=2, max_tokens=12, seed=7)
        assert [choice.text for choice in answer.choices] == expected


def test_stop_text_and_extensions_reach_the_model(client: Any) -> None:
    text = MODEL.generate("the", max_new_tokens=30, temperature=0.9, top_k=40, seed=2)
    stop = text[5:7]
    answer = client.completions.create(
        model="tiny", prompt="the", max_tokens=30, temperature=0.9, seed=2, stop=[stop], extra_body={"top_k": 40}
    )
    assert (answer.choices[0].text, answer.choices[0].finish_reason) == (text[: text.index(stop)], "stop")


@pytest.mark.parametrize(
    ("body", "status", "message"),
    [
        (b"", 400, "body: Field required"),
        (b"{", 400, "the body is not valid JSON"),
        (b"\xff\xfe\x00", 400, ""),
        (b"[]", 400, "body"),
        (b'{"prompt": {}}', 400, "prompt"),
        (b'{"prompt": []}', 400, "prompt: 0 prompts"),
        (b'{"prompt": "\\ud800"}', 400, "prompt: not valid Unicode text"),
        (b'{"prompt": [400]}', 400, "token 400 is not in the vocabulary"),
        (b'{"prompt": "' + b"a" * 200 + b'"}', 400, "200 tokens exceed the context of the model"),
        (b'{"max_tokens": 0}', 400, "max_tokens"),
        (b'{"max_tokens": 1e99}', 400, "max_tokens"),
        (b'{"temperature": -1}', 400, "temperature"),
        (b'{"temperature": NaN}', 400, ""),
        (b'{"stop": [""]}', 400, "stop"),
        (b'{"stop_token_ids": [999]}', 400, "stop token 999 is not in the vocabulary"),
        (b'{"n": 1000}', 400, "n"),
        (b'{"echo": true}', 400, "echo"),
        (b'{"tempratur": 1}', 400, "unknown field 'tempratur'"),
        (b'{"model": "gpt-4"}', 404, "the model 'gpt-4' does not exist"),
    ],
)
def test_bad_body_is_answered_in_openai_format(url: str, body: bytes, status: int, message: str) -> None:
    answer = httpx.post(f"{url}/v1/completions", content=body, headers={"Content-Type": "application/json"}, timeout=60)
    assert answer.status_code == status, answer.text
    error = answer.json()["error"]
    assert message in error["message"] and "\n" not in error["message"]
    assert error.keys() == {"message", "type", "param", "code"}


def test_too_large_body_unknown_path_and_method_are_refused(url: str) -> None:
    large = httpx.post(f"{url}/v1/completions", content=b" " * (MAX_BODY_BYTES + 1), timeout=60)
    assert (large.status_code, large.json()["error"]["type"]) == (413, "invalid_request_error")
    assert httpx.get(f"{url}/nowhere").json()["error"]["type"] == "not_found_error"
    assert httpx.get(f"{url}/v1/completions").status_code == 405


def test_api_key_is_required_below_v1_alone() -> None:
    with serve(api_key="secret") as (url, _):
        with connect(url, "secret") as right:
            assert right.completions.create(model="tiny", prompt="a", max_tokens=1).choices
        with connect(url, "wrong") as wrong, pytest.raises(openai.AuthenticationError):
            wrong.models.list()
        assert [httpx.get(f"{url}{path}").status_code for path in ("/health", "/metrics", "/")] == [200, 200, 200]


def test_200_streams_at_once_each_get_their_own_text() -> None:
    async def run(url: str) -> list[str]:
        async def stream(client: Any, seed: int) -> str:
            chunks = await client.completions.create(
                model="tiny", prompt=f"{seed}", max_tokens=1 + seed % 9, seed=seed, stream=True
            )
            return "".join([chunk.choices[0].text async for chunk in chunks])

        settings = {"api_key": "x", "max_retries": 0, "timeout": 300}
        async with openai.AsyncOpenAI(base_url=f"{url}/v1", **settings) as client:
            return await asyncio.gather(*(stream(client, seed) for seed in range(200)))

    with serve(max_batch=16, timeout=300.0) as (url, engine):
        texts = asyncio.run(run(url))
        assert engine.metrics.running == engine.metrics.waiting == 0
        metrics = httpx.get(f"{url}/metrics", timeout=60).text
        assert 'gpt_completions_total{outcome="finished"} 200' in metrics
    expected = [
        MODEL.generate(f"{seed}", max_new_tokens=1 + seed % 9, temperature=1.0, seed=seed) for seed in range(0, 200, 20)
    ]
    assert texts[::20] == expected


def test_full_queue_is_refused_with_429_and_accepts_again_later() -> None:
    model, may_continue = build_paused_model()
    with serve(model, max_batch=1, max_queue=1) as (url, engine), connect(url) as client:
        with open_stream(url), open_stream(url):
            wait_until(lambda: engine.metrics.running + engine.metrics.waiting == 2)
            with pytest.raises(openai.RateLimitError, match="too many requests wait"):
                client.completions.create(model="tiny", prompt="a", max_tokens=1)
        may_continue.set()
        wait_until(lambda: engine.metrics.running + engine.metrics.waiting == 0)
        assert client.completions.create(model="tiny", prompt="a", max_tokens=1).choices


def build_paused_model() -> tuple[LanguageModel, threading.Event]:
    """Build a model that computes nothing until the event is set."""
    model, may_continue = LanguageModel(build_model(MODEL.model.config), MODEL.tokenizer), threading.Event()
    model.model.register_forward_pre_hook(lambda module, inputs: may_continue.wait(60.0) and None)
    return model, may_continue


def open_stream(url: str) -> socket.socket:
    """Ask for a stream over a bare socket, and read nothing of it."""
    host, port = url.removeprefix("http://").split(":")
    body = b'{"prompt": "a", "max_tokens": 120, "stream": true, "n": 1}'
    connection = socket.create_connection((host, int(port)))
    head = f"POST /v1/completions HTTP/1.1\r\nHost: {host}\r\nContent-Type: application/json\r\n"
    connection.sendall(head.encode() + f"Content-Length: {len(body)}\r\n\r\n".encode() + body)
    return connection


@pytest.mark.parametrize("stream", [True, False])
def test_completion_ends_when_its_client_leaves(stream: bool) -> None:
    body = {"prompt": "a", "max_tokens": 120, "stream": stream}
    with serve(slow_model(), max_batch=2) as (url, engine):
        if stream:
            with httpx.stream("POST", f"{url}/v1/completions", json=body, timeout=60) as answer:
                assert next(answer.iter_lines()).startswith("data: ")
        else:
            with pytest.raises(httpx.ReadTimeout):
                httpx.post(f"{url}/v1/completions", json=body, timeout=0.3)
        wait_until(lambda: 'outcome="cancelled"} 1' in engine.metrics.format())
        assert engine.metrics.running == 0


def slow_model() -> LanguageModel:
    model = LanguageModel(build_model(MODEL.model.config), MODEL.tokenizer)
    model.model.register_forward_pre_hook(lambda module, inputs: time.sleep(0.05))
    return model


def test_request_that_takes_too_long_ends_with_an_error() -> None:
    with serve(slow_model(), timeout=0.5) as (url, _):
        answer = httpx.post(f"{url}/v1/completions", json={"prompt": "a", "max_tokens": 120}, timeout=60)
        assert (answer.status_code, answer.json()["error"]["message"]) == (500, "the request took too long")


def test_failure_of_the_model_is_reported_and_the_server_goes_on() -> None:
    model = LanguageModel(build_model(MODEL.model.config), MODEL.tokenizer)
    fail_once = [RuntimeError("out of memory")]

    def fail(module: Any, inputs: Any) -> None:
        if fail_once:
            raise fail_once.pop()

    model.model.register_forward_pre_hook(fail)
    with serve(model) as (url, _):
        first, second = (
            httpx.post(f"{url}/v1/completions", json={"prompt": "a", "max_tokens": 3}, timeout=60) for _ in range(2)
        )
        assert (first.status_code, first.json()["error"]["type"]) == (500, "server_error")
        assert second.status_code == 200


def test_score_gives_the_loss_of_each_token(url: str) -> None:
    tokens = httpx.post(f"{url}/v1/score", json={"text": "the model"}, timeout=60).json()["tokens"]
    assert "".join(token["text"] for token in tokens) == "the model"
    assert sum(token["nats"] for token in tokens) / len(tokens) == pytest.approx(MODEL.score("the model"))
    assert httpx.post(f"{url}/v1/score", json={"text": ""}, timeout=60).status_code == 400


def test_metrics_are_prometheus_text(url: str) -> None:
    answer = httpx.get(f"{url}/metrics", timeout=60)
    assert answer.headers["content-type"].startswith("text/plain; version=0.0.4")
    lines = [line for line in answer.text.splitlines() if not line.startswith("#")]
    assert all(float(line.rpartition(" ")[2]) >= 0 for line in lines)
    assert any(line.startswith("gpt_generated_tokens_total") for line in lines)


def test_page_loads_nothing_from_elsewhere(url: str) -> None:
    answer = httpx.get(url, timeout=60)
    assert "default-src 'none'" in answer.headers["content-security-policy"]
    assert "http://" not in answer.text and "https://" not in answer.text and "innerHTML" not in answer.text
