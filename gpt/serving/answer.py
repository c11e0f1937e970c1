"""Answers to requests for generated text, whole or as server-sent events."""

import asyncio
import json
import secrets
import time
from collections.abc import AsyncIterator, Sequence

from fastapi import Request, Response
from fastapi.responses import JSONResponse

from gpt.serving.engine import Job, Update
from gpt.serving.errors import error_body, error_response
from gpt.serving.formats import AnswerFormat


class Answer:
    """The answer to one request.

    Args:
        jobs: its completions, those of the same prompt one after the other.
        form: shape of the answer.
        model_id: name of the model in the API.
        per_prompt: completions of each prompt.
    """

    def __init__(self, jobs: Sequence[Job], form: AnswerFormat, model_id: str, per_prompt: int):
        self.jobs, self._form, self._per_prompt = jobs, form, per_prompt
        self._head = {
            "id": f"{form.id_prefix}-{secrets.token_hex(12)}",
            "created": int(time.time()),
            "model": model_id,
        }

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
                update = Update(text, tokens, 0, updates[-1].finish_reason)
                choices.append(self._form.build_choice(index, job.text, update))
            head = self._head | {"object": self._form.kind}
            return JSONResponse(head | {"choices": choices, "usage": self._count_usage()})
        finally:
            self.cancel()
            watcher.cancel()

    async def stream(self, *, include_usage: bool) -> AsyncIterator[str]:
        """Yield server-sent events; closed when the client leaves, which ends the jobs."""
        head = self._head | {"object": self._form.chunk_kind}
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
                chunk = self._form.build_chunk(index, self.jobs[index].text, update)
                yield _format_event(head | {"choices": [chunk]})
            if include_usage:
                yield _format_event(head | {"choices": [], "usage": self._count_usage()})
            yield "data: [DONE]\n\n"
        finally:
            self.cancel()
            for forwarder in forwarders:
                forwarder.cancel()

    def cancel(self) -> None:
        """End the jobs that are not finished."""
        for job in self.jobs:
            job.is_cancelled = True

    def _count_usage(self) -> dict[str, int]:
        completions = [job.text.completion for job in self.jobs]
        n_prompt = sum(len(each.prompt) for each in completions[:: self._per_prompt])
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


def _format_event(value: dict[str, object]) -> str:
    return f"data: {json.dumps(value, ensure_ascii=False)}\n\n"
