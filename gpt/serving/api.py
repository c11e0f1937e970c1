"""The HTTP interface: OpenAI's /v1/models and /v1/completions, /v1/score, /health, /metrics and a page at /."""

import asyncio
import hmac
import json
import secrets
import time
from collections.abc import AsyncIterator, Sequence
from importlib.resources import files

from fastapi import FastAPI, Request, Response
from fastapi.responses import HTMLResponse, JSONResponse, PlainTextResponse, StreamingResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from gpt.errors import UserError
from gpt.inference.language_model import LanguageModel
from gpt.serving.engine import Engine, Job, Update
from gpt.serving.errors import error_body, error_response, install_error_handlers
from gpt.serving.metrics import Metrics
from gpt.serving.schema import MAX_PROMPTS, CompletionRequest, ScoreRequest

MAX_BODY_BYTES = 8 * 2**20
FINISH_REASONS = {"stop": "stop", "length": "length", "context": "length"}
"""Reason here -> in OpenAI's API."""
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
    """
    app = FastAPI(openapi_url=None)
    created = int(time.time())
    install_error_handlers(app)
    app.add_middleware(Gate, api_key=api_key, metrics=engine.metrics)

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
        model = {"id": model_id, "object": "model", "created": created, "owned_by": "local"}
        return {"object": "list", "data": [model | {"max_model_len": engine.model.block_size}]}

    @app.post("/v1/completions")
    async def completions(body: CompletionRequest, request: Request) -> Response:
        if body.model not in ("", model_id):
            return _refuse_model(body.model, model_id)
        loop = asyncio.get_running_loop()
        answer = Answer(await asyncio.to_thread(build_jobs, body, engine.model, loop), body, model_id)
        engine.submit(*answer.jobs)
        if body.stream:
            return StreamingResponse(answer.stream(), media_type="text/event-stream")
        return await answer.wait(request)

    @app.post("/v1/score")
    async def score(body: ScoreRequest) -> Response:
        if body.model not in ("", model_id):
            return _refuse_model(body.model, model_id)
        scores = await asyncio.wrap_future(engine.call(lambda: engine.model.score_tokens(body.text)))
        return JSONResponse({"tokens": [{"id": s.token, "text": s.text, "nats": s.nats} for s in scores]})

    return app


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


def build_jobs(body: CompletionRequest, model: LanguageModel, loop: asyncio.AbstractEventLoop) -> list[Job]:
    """Return a job for each completion that a request asks for; encoding a long prompt takes a while.

    Raises:
        UserError: a prompt that does not fit the context or the tokenizer.
    """
    prompts, config = body.list_prompts(), body.build_config()
    if not 1 <= len(prompts) <= MAX_PROMPTS:
        raise UserError(f"prompt: {len(prompts)} prompts; a request has 1 to {MAX_PROMPTS}")
    seed = secrets.randbits(62) if body.seed is None else body.seed
    jobs = []
    for index in range(len(prompts) * body.n):
        prompt = prompts[index // body.n]
        text = model.build_completion(prompt, config, (seed + index) % 2**63)
        text.completion.n_top_logprobs = body.logprobs
        jobs.append(Job(text, loop))
    return jobs


class Answer:
    """The answer to one request for completions.

    Args:
        jobs: its completions.
        body: the request.
        model_id: name of the model in the API.
    """

    def __init__(self, jobs: Sequence[Job], body: CompletionRequest, model_id: str):
        self.jobs, self._body = jobs, body
        self._head = {
            "id": f"cmpl-{secrets.token_hex(12)}",
            "object": "text_completion",
            "created": int(time.time()),
            "model": model_id,
        }
        self._text_lengths = [0] * len(jobs)

    async def wait(self, request: Request) -> Response:
        """Return the whole answer; the jobs end early if the client leaves."""
        watcher = asyncio.ensure_future(_wait_until_gone(request))
        try:
            choices = []
            for index, job in enumerate(self.jobs):
                updates = [update async for update in _read(job, watcher)]
                if not updates:  # the client has left
                    return Response(status_code=499)
                if updates[-1].error:
                    return error_response(updates[-1].error, 500)
                text = "".join(update.text for update in updates)
                tokens = tuple(text for update in updates for text in update.token_texts)
                choices.append(self._format_choice(index, Update(text, tokens, 0, updates[-1].finish_reason)))
            return JSONResponse(self._head | {"choices": choices, "usage": self._count_usage()})
        finally:
            self.cancel()
            watcher.cancel()

    async def stream(self) -> AsyncIterator[str]:
        """Yield server-sent events; closed when the client leaves, which ends the jobs."""
        queue: asyncio.Queue[tuple[int, Update]] = asyncio.Queue()

        async def forward(index: int, job: Job) -> None:
            while True:
                update = await job.updates.get()
                queue.put_nowait((index, update))

        forwarders = [asyncio.ensure_future(forward(index, job)) for index, job in enumerate(self.jobs)]
        try:
            n_open = len(self.jobs)
            while n_open:
                index, update = await queue.get()
                if update.error:
                    yield _format_event(error_body(update.error, 500))
                    return
                n_open -= update.finish_reason is not None
                yield _format_event(self._head | {"choices": [self._format_choice(index, update)]})
            if self._body.stream_options and self._body.stream_options.include_usage:
                yield _format_event(self._head | {"choices": [], "usage": self._count_usage()})
            yield "data: [DONE]\n\n"
        finally:
            self.cancel()
            for forwarder in forwarders:
                forwarder.cancel()

    def cancel(self) -> None:
        """End the jobs that are not finished."""
        for job in self.jobs:
            job.is_cancelled = True

    def _format_choice(self, index: int, update: Update) -> dict[str, object]:
        reason = None if update.finish_reason is None else FINISH_REASONS[update.finish_reason]
        logprobs = None if self._body.logprobs is None else self._format_logprobs(index, update)
        return {"index": index, "text": update.text, "finish_reason": reason, "logprobs": logprobs}

    def _format_logprobs(self, index: int, update: Update) -> dict[str, object]:
        text = self.jobs[index].text
        logprobs = text.completion.logprobs[update.first_token : update.first_token + len(update.token_texts)]
        offsets, length = [], self._text_lengths[index]
        for token_text in update.token_texts:
            offsets.append(length)
            length += len(token_text)
        self._text_lengths[index] = length
        return {
            "tokens": list(update.token_texts),
            "token_logprobs": [position.logprob for position in logprobs],
            "top_logprobs": [
                {text.decode_token(token): value for token, value in position.top.items()} for position in logprobs
            ],
            "text_offset": offsets,
        }

    def _count_usage(self) -> dict[str, int]:
        completions = [job.text.completion for job in self.jobs]
        n_prompt = sum(len(each.prompt) for each in completions[:: self._body.n])
        n_new = sum(len(each.tokens) for each in completions)
        return {"prompt_tokens": n_prompt, "completion_tokens": n_new, "total_tokens": n_prompt + n_new}


async def _read(job: Job, watcher: "asyncio.Future[None]") -> AsyncIterator[Update]:
    """Yield a job's updates to its last one; stop where the client has left."""
    while True:
        getter = asyncio.ensure_future(job.updates.get())
        await asyncio.wait((getter, watcher), return_when=asyncio.FIRST_COMPLETED)
        if not getter.done():
            getter.cancel()
            return
        update = getter.result()
        yield update
        if update.finish_reason is not None or update.error:
            return


async def _wait_until_gone(request: Request) -> None:
    """Return when the client has closed the connection."""
    while not await request.is_disconnected():
        await asyncio.sleep(0.1)


def _refuse_model(name: str, model_id: str) -> JSONResponse:
    message = f"the model {name!r} does not exist; this server has {model_id!r}"
    return error_response(message, 404, "model", "model_not_found")


def _format_event(value: dict[str, object]) -> str:
    return f"data: {json.dumps(value, ensure_ascii=False)}\n\n"
