"""Continuous batching: one thread generates all running completions together and admits waiting ones between steps.

    handlers --submit--> queue --admit--> rows of the KV cache --step--> updates --> handlers

A completion that ends frees its row at the next step, so a long one holds up no short one (Yu et al. 2022, "Orca").
"""

import asyncio
import logging
import threading
import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any, TypeVar

from gpt.inference.generate import Batch, Completion, FinishReason
from gpt.inference.language_model import LanguageModel
from gpt.inference.text import CompletionText
from gpt.serving.metrics import Metrics

log = logging.getLogger(__name__)

Result = TypeVar("Result")


class QueueFullError(Exception):
    """As many requests wait as may."""


class ShutdownError(Exception):
    """The server takes no more requests."""


@dataclass(frozen=True)
class Update:
    """News of a completion."""

    text: str
    token_texts: tuple[str, ...] = ()
    """Texts of the tokens that are new since the last update."""
    first_token: int = 0
    """Index of the first of them."""
    finish_reason: FinishReason | None = None
    error: str | None = None
    """Message, where the generation failed or took too long."""


@dataclass(eq=False)
class Job:
    """A completion that a client waits for."""

    text: CompletionText
    loop: asyncio.AbstractEventLoop
    updates: "asyncio.Queue[Update]" = field(default_factory=asyncio.Queue)
    submitted: float = field(default_factory=time.monotonic)
    is_cancelled: bool = False
    """Set by the handler when its client has left."""

    def send(self, update: Update) -> None:
        """Hand an update to the handler, from the engine's thread."""
        self.loop.call_soon_threadsafe(self.updates.put_nowait, update)


class Engine:
    """Generates the completions of all clients in one thread.

    Args:
        model: the model.
        max_batch: completions that are generated at the same time.
        max_queue: completions that may wait for a place.
        timeout: seconds after which a completion is ended with an error, waiting included.
        metrics: receives counts.
    """

    def __init__(self, model: LanguageModel, *, max_batch: int, max_queue: int, timeout: float, metrics: Metrics):
        self.model, self.metrics = model, metrics
        self._max_batch, self._max_queue, self._timeout = max_batch, max_queue, timeout
        self._waiting: deque[Job] = deque()
        self._calls: deque[tuple[Callable[[], Any], Future[Any]]] = deque()
        self._running: dict[Completion, Job] = {}
        self._changed = threading.Condition()
        self._is_stopping = False
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
        self._batch = self._build_batch()

    def start(self) -> None:
        """Start the thread."""
        self._thread.start()

    def stop(self, grace_seconds: float) -> None:
        """Take no more requests, let those that run and wait finish for a while, then end them with an error."""
        with self._changed:
            self._is_stopping = True
            self._changed.notify()
        self._thread.join(grace_seconds)
        with self._changed:
            self._timeout = 0.0
            self._changed.notify()
        self._thread.join()

    @property
    def is_alive(self) -> bool:
        """True while requests are served."""
        return self._thread.is_alive() and not self._is_stopping

    def submit(self, *jobs: Job) -> None:
        """Let jobs wait for their places, all or none.

        Raises:
            QueueFullError: too many wait already.
            ShutdownError: the server is stopping.
        """
        with self._changed:
            if self._is_stopping:
                raise ShutdownError
            free = self._max_batch - len(self._running)
            if len(self._waiting) + len(jobs) > self._max_queue + max(0, free):
                raise QueueFullError
            self._waiting += jobs
            self.metrics.waiting = len(self._waiting)
            self._changed.notify()

    def call(self, function: Callable[[], Result]) -> "Future[Result]":
        """Run a function that uses the model between two steps.

        Raises:
            QueueFullError: too many wait already.
            ShutdownError: the server is stopping.
        """
        future: Future[Result] = Future()
        with self._changed:
            if self._is_stopping:
                raise ShutdownError
            if len(self._calls) >= self._max_queue:
                raise QueueFullError
            self._calls.append((function, future))
            self._changed.notify()
        return future

    def _build_batch(self) -> Batch:
        model = self.model
        return Batch(
            model.model,
            model.model.config,
            vocab_size=model.tokenizer.vocab_size,
            end_of_text=model.tokenizer.end_of_text,
            max_rows=self._max_batch,
            dtype=model.dtype,
        )

    def _run(self) -> None:
        while True:
            with self._changed:
                while not (self._waiting or self._running or self._calls or self._is_stopping):
                    self._changed.wait()
                if self._is_stopping and not (self._waiting or self._running or self._calls):
                    return
            try:
                self._run_calls()
                self._end_late()
                self._report(self._batch.step())
                self._admit()
            except Exception as error:
                log.exception("generation failed")
                self._fail_all(f"generation failed: {type(error).__name__}")

    def _run_calls(self) -> None:
        while self._calls:
            function, future = self._calls.popleft()
            if future.set_running_or_notify_cancel():
                try:
                    future.set_result(function())
                except BaseException as error:
                    future.set_exception(error)

    def _admit(self) -> None:
        """Read the prompt of one waiting job: those that run stall for one prompt at most."""
        self._batch.remove_finished()
        with self._changed:
            if not self._waiting or len(self._batch) == self._max_batch:
                return
            job = self._waiting.popleft()
            self._running[job.text.completion] = job
            self.metrics.waiting, self.metrics.running = len(self._waiting), len(self._running)
        self._report(self._batch.add([job.text.completion]))
        self.metrics.observe_seconds("gpt_time_to_first_token_seconds", time.monotonic() - job.submitted)
        self.metrics.count("gpt_prompt_tokens_total", len(job.text.completion.prompt))

    def _report(self, completions: list[Completion]) -> None:
        for completion in completions:
            job = self._running.get(completion)
            if job is None:
                continue
            n_before = len(job.text.token_texts)
            text = job.text.read()
            token_texts = tuple(job.text.token_texts[n_before:])
            self.metrics.count("gpt_generated_tokens_total", len(token_texts))
            if completion.finish_reason == "diverged":
                self._finish(job, Update(text, error="the model's logits are not finite"))
            elif completion.finish_reason is not None:
                self._finish(job, Update(text, token_texts, n_before, completion.finish_reason))
            elif token_texts:
                job.send(Update(text, token_texts, n_before))

    def _finish(self, job: Job, update: Update) -> None:
        with self._changed:
            self._running.pop(job.text.completion, None)
        self.metrics.running = len(self._running)
        job.text.completion.finish_reason = job.text.completion.finish_reason or "stop"  # frees its row
        outcome = "error" if update.error else "cancelled" if job.is_cancelled else "finished"
        self.metrics.count("gpt_completions_total", outcome=outcome)
        self.metrics.observe_seconds("gpt_completion_seconds", time.monotonic() - job.submitted)
        job.send(update)

    def _end_late(self) -> None:
        """End the jobs whose clients have left, and those that take too long."""
        now = time.monotonic()
        with self._changed:
            ended = [job for job in self._waiting if job.is_cancelled or now - job.submitted > self._timeout]
            self._waiting = deque(job for job in self._waiting if job not in ended)
            self.metrics.waiting = len(self._waiting)
            ended += [job for job in self._running.values() if job.is_cancelled or now - job.submitted > self._timeout]
        for job in ended:
            self._finish(job, Update("", error=None if job.is_cancelled else "the request took too long"))
        self.metrics.running = len(self._running)

    def _fail_all(self, message: str) -> None:
        with self._changed:
            jobs = [*self._running.values(), *self._waiting]
            self._waiting.clear()
        for job in jobs:
            self._finish(job, Update("", error=message))
        self._batch = self._build_batch()
