"""The HTTP interface: OpenAI's models, completions and chat completions, /v1/score, /health, /metrics, a page at /."""

import asyncio
import hmac
import secrets
import time
from collections.abc import Callable, Sequence
from importlib.resources import files

from fastapi import FastAPI, Request, Response
from fastapi.responses import HTMLResponse, JSONResponse, PlainTextResponse, StreamingResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from gpt.errors import UserError
from gpt.inference.chat import ChatEncoder
from gpt.inference.language_model import LanguageModel
from gpt.inference.text import CompletionText
from gpt.serving.answer import Answer
from gpt.serving.engine import Engine, Job
from gpt.serving.errors import UnknownModelError, error_response, install_error_handlers
from gpt.serving.formats import AnswerFormat, ChatFormat, CompletionFormat
from gpt.serving.metrics import Metrics
from gpt.serving.schema import MAX_PROMPTS, ChatRequest, CompletionRequest, ScoreRequest

MAX_BODY_BYTES = 8 * 2**20
NO_CHAT_TEMPLATE = "the model has no chat template, which an imported chat model brings along; use /v1/completions"
PAGE_POLICY = (
    "default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; img-src data:; connect-src 'self'; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
"""Content security policy of the page: it loads nothing, and talks to this server alone."""


def build_app(engine: Engine, model_id: str, *, api_key: str = "") -> FastAPI:
    """Return the application.

    Args:
        engine: generates; started and stopped by the caller.
        model_id: name of the model in the API.
        api_key: key that requests below /v1 must carry as a bearer token; empty: none.

    Raises:
        UserError: the model's chat template is not valid.
    """
    app = FastAPI(openapi_url=None)
    model = engine.model
    chat = None if model.chat_template is None else ChatEncoder(model.tokenizer, model.chat_template)
    install_error_handlers(app)
    app.add_middleware(Gate, api_key=api_key, metrics=engine.metrics)
    _add_information(app, engine, model_id)

    async def respond(
        body: CompletionRequest | ChatRequest,
        request: Request,
        form: AnswerFormat,
        build_texts: Callable[[], Sequence[CompletionText]],
    ) -> Response:
        texts, loop = await asyncio.to_thread(build_texts), asyncio.get_running_loop()
        answer = Answer([Job(text, loop) for text in texts], form, model_id, per_prompt=body.n)
        engine.submit(*answer.jobs)
        if not body.stream:
            return await answer.wait(request)
        include_usage = body.stream_options is not None and body.stream_options.include_usage
        return StreamingResponse(answer.stream(include_usage=include_usage), media_type="text/event-stream")

    @app.post("/v1/completions")
    async def completions(body: CompletionRequest, request: Request) -> Response:
        _require_model(body.model, model_id)
        return await respond(body, request, CompletionFormat(), lambda: build_completion_texts(body, model))

    @app.post("/v1/chat/completions")
    async def chat_completions(body: ChatRequest, request: Request) -> Response:
        _require_model(body.model, model_id)
        if chat is None:
            return error_response(NO_CHAT_TEMPLATE, 400, code="no_chat_template")
        return await respond(body, request, ChatFormat(), lambda: build_chat_texts(body, model, chat))

    @app.post("/v1/score")
    async def score(body: ScoreRequest) -> Response:
        _require_model(body.model, model_id)
        scores = await asyncio.wrap_future(engine.call(lambda: model.score_tokens(body.text)))
        return JSONResponse({"tokens": [{"id": s.token, "text": s.text, "nats": s.nats} for s in scores]})

    return app


def _add_information(app: FastAPI, engine: Engine, model_id: str) -> None:
    """Add the page, and the answers that need no generation."""
    created = int(time.time())

    @app.get("/")
    async def page() -> HTMLResponse:
        html = (files("gpt.serving") / "page.html").read_text(encoding="utf-8")
        return HTMLResponse(html, headers={"Content-Security-Policy": PAGE_POLICY})

    @app.get("/health")
    async def health() -> JSONResponse:
        return JSONResponse({"status": "ok"}) if engine.is_alive else JSONResponse({"status": "stopping"}, 503)

    @app.get("/metrics")
    async def metrics() -> PlainTextResponse:
        return PlainTextResponse(engine.metrics.format(), media_type="text/plain; version=0.0.4")

    @app.get("/v1/models")
    async def models() -> dict[str, object]:
        entry = {"id": model_id, "object": "model", "created": created, "owned_by": "local"}
        return {"object": "list", "data": [entry | {"max_model_len": engine.model.block_size}]}


class Gate:
    """Middleware that lets no request in without the API key, or with too large a body, and counts responses.

    Args:
        app: the application.
        api_key: key of the requests below /v1; empty: none.
        metrics: receives the counts.
    """

    def __init__(self, app: ASGIApp, api_key: str, metrics: Metrics):
        self._app, self._api_key, self._metrics = app, api_key, metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return

        async def count_and_send(message: Message) -> None:
            if message["type"] == "http.response.start":
                self._metrics.count("gpt_http_requests_total", status=str(message["status"]))
            await send(message)

        await (self._refuse(Request(scope)) or self._app)(scope, receive, count_and_send)

    def _refuse(self, request: Request) -> Response | None:
        given = request.headers.get("authorization", "").removeprefix("Bearer ")
        is_api = request.url.path.startswith("/v1/")
        if self._api_key and is_api and not hmac.compare_digest(given.encode(), self._api_key.encode()):
            return error_response("wrong or missing API key", 401, code="invalid_api_key")
        if request.method == "POST":
            length = request.headers.get("content-length")
            if length is None:
                return error_response("the request has no Content-Length", 411)
            if not length.isdigit() or int(length) > MAX_BODY_BYTES:
                return error_response(f"the body is larger than {MAX_BODY_BYTES} bytes", 413)
        return None


def build_completion_texts(body: CompletionRequest, model: LanguageModel) -> list[CompletionText]:
    """Return the completions that a request asks for, not yet begun; encoding a long prompt takes a while.

    Raises:
        UserError: a prompt that does not fit the context or the tokenizer.
    """
    prompts = body.list_prompts()
    if not 1 <= len(prompts) <= MAX_PROMPTS:
        raise UserError(f"prompt: {len(prompts)} prompts; a request has 1 to {MAX_PROMPTS}")
    return _build_texts(body, model, prompts, body.max_tokens, place="prompt")


def build_chat_texts(body: ChatRequest, model: LanguageModel, chat: ChatEncoder) -> list[CompletionText]:
    """Return the turns of the assistant that a request asks for, not yet begun.

    Raises:
        UserError: messages that the chat template refuses, or that do not fit the context.
    """
    ids = chat.encode([message.describe() for message in body.messages])
    max_tokens = body.max_completion_tokens or body.max_tokens or model.block_size
    return _build_texts(body, model, [ids], max_tokens, place="messages")


def _build_texts(
    body: CompletionRequest | ChatRequest,
    model: LanguageModel,
    prompts: Sequence[str | list[int]],
    max_tokens: int,
    place: str,
) -> list[CompletionText]:
    config, texts = body.build_config(max_tokens), []
    seed = secrets.randbits(62) if body.seed is None else body.seed
    for index in range(len(prompts) * body.n):
        text = model.build_completion(prompts[index // body.n], config, (seed + index) % 2**63, place)
        text.completion.n_top_logprobs = body.n_top_logprobs
        texts.append(text)
    return texts


def _require_model(name: str, model_id: str) -> None:
    if name not in ("", model_id):
        raise UnknownModelError(f"the model {name!r} does not exist; this server has {model_id!r}")
