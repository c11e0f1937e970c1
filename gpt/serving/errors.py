"""Errors in the format of OpenAI's API."""

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from pydantic import ValidationError
from starlette.exceptions import HTTPException

from gpt.errors import UserError
from gpt.serving.engine import QueueFullError, ShutdownError

KINDS = {401: "authentication_error", 404: "not_found_error", 429: "rate_limit_error"}
"""Status -> type of the error; other 4xx are invalid_request_error, and 5xx server_error."""
MAX_MESSAGE_CHARACTERS = 500


class UnknownModelError(Exception):
    """A request names a model that this server does not have."""


def error_body(message: str, status: int, param: str | None = None, code: str | None = None) -> dict[str, object]:
    """Return the body of an error."""
    kind = KINDS.get(status, "invalid_request_error" if status < 500 else "server_error")
    return {"error": {"message": message[:MAX_MESSAGE_CHARACTERS], "type": kind, "param": param, "code": code}}


def error_response(message: str, status: int, param: str | None = None, code: str | None = None) -> JSONResponse:
    """Return the response for an error."""
    headers = {"Retry-After": "1"} if status in (429, 503) else {}
    return JSONResponse(error_body(message, status, param, code), status, headers)


def explain_invalid_body(errors: list[dict[str, object]]) -> tuple[str, str | None]:
    """Return one line for pydantic's errors, and the name of the field."""
    first = errors[0]
    location = first["loc"] if isinstance(first["loc"], tuple) else ()
    path = [str(part) for part in location if part != "body"]
    if first["type"] == "json_invalid":
        return "the body is not valid JSON", None
    name = path[0] if path else None
    if first["type"] == "extra_forbidden":
        return f"unknown field {name!r}", name
    return f"{name or 'body'}: {first['msg']}", name


def install_error_handlers(app: FastAPI) -> None:
    """Answer every error in OpenAI's format."""

    async def on_invalid(request: Request, error: Exception) -> JSONResponse:
        assert isinstance(error, RequestValidationError | ValidationError)
        message, param = explain_invalid_body([dict(each) for each in error.errors()])
        return error_response(message, 400, param)

    async def on_http(request: Request, error: Exception) -> JSONResponse:
        assert isinstance(error, HTTPException)
        return error_response(str(error.detail), error.status_code)

    async def on_mistake(request: Request, error: Exception) -> JSONResponse:
        return error_response(str(error), 400)

    async def on_unknown_model(request: Request, error: Exception) -> JSONResponse:
        return error_response(str(error), 404, "model", "model_not_found")

    async def on_full_queue(request: Request, error: Exception) -> JSONResponse:
        return error_response("too many requests wait already; try again later", 429, code="queue_full")

    async def on_shutdown(request: Request, error: Exception) -> JSONResponse:
        return error_response("the server is shutting down", 503)

    async def on_failure(request: Request, error: Exception) -> JSONResponse:
        return error_response("the server failed", 500)

    app.add_exception_handler(Exception, on_failure)
    app.add_exception_handler(RequestValidationError, on_invalid)
    app.add_exception_handler(ValidationError, on_invalid)
    app.add_exception_handler(HTTPException, on_http)
    app.add_exception_handler(UserError, on_mistake)
    app.add_exception_handler(UnknownModelError, on_unknown_model)
    app.add_exception_handler(QueueFullError, on_full_queue)
    app.add_exception_handler(ShutdownError, on_shutdown)
