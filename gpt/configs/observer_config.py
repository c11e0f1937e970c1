"""Configuration of the observers: logging, evaluation, samples, profiling and loss spikes."""

from typing import Annotated

from pydantic import Field, field_validator

from gpt.configs.base import MAX_COUNT, Config, FilePath
from gpt.configs.resume_rule import SAFE


class LogConfig(Config):
    """Metrics on the console and in metrics.jsonl."""

    interval: Annotated[int, SAFE] = Field(10, ge=1)
    """Steps between two reports of the training loss."""
    grad_norms: Annotated[bool, SAFE] = False
    """Report the norm of each layer's gradient and weights, too: grad_norm/LAYER and param_norm/LAYER."""
    sink_timeout: Annotated[float, SAFE] = Field(60.0, gt=0)
    """Seconds that a sink may block the run; then the console or a sink of yours is dropped, and metrics.jsonl is
    written later."""


class EvalConfig(Config):
    """Evaluation on the validation set; the last step is always evaluated."""

    interval: Annotated[int, SAFE] = Field(200, ge=0)
    """Steps between evaluations; 0: only the last step."""
    batches: Annotated[int, SAFE] = Field(0, ge=0)
    """Micro-batches per evaluation; 0: the whole validation set."""


class SampleConfig(Config):
    """Sampling from the model, during training and by `gpt sample`."""

    max_new_tokens: Annotated[int, SAFE] = Field(200, ge=1, le=MAX_COUNT)
    """Maximum number of tokens to generate; an end-of-text token or a full context ends the sample earlier."""
    temperature: Annotated[float, SAFE] = Field(0.8, ge=0)
    """Divides the logits; 0: always take the most likely token."""
    top_k: Annotated[int, SAFE] = Field(0, ge=0, le=MAX_COUNT)
    """Sample from the k most likely tokens; 0: from all."""
    top_p: Annotated[float, SAFE] = Field(1.0, gt=0, le=1)
    """Sample from the fewest most likely tokens whose probabilities add up to at least this (nucleus sampling)."""
    min_p: Annotated[float, SAFE] = Field(0.0, ge=0, le=1)
    """Sample only from tokens at least this fraction as likely as the most likely one; 0: from all."""
    repetition_penalty: Annotated[float, SAFE] = Field(1.0, gt=0, le=1000)
    """Makes tokens that the text already has less likely: divides their positive logits and multiplies negative ones;
    1: none."""
    stop: Annotated[tuple[str, ...], SAFE] = ()
    """Texts before the first of which the sample ends."""
    stop_tokens: Annotated[tuple[int, ...], SAFE] = ()
    """Token ids before the first of which the sample ends, besides end-of-text."""

    @field_validator("stop")
    @classmethod
    def _require_text(cls, stop: tuple[str, ...]) -> tuple[str, ...]:
        if "" in stop:
            raise ValueError("an empty text would end every sample at once")
        return stop


class TextSampleConfig(SampleConfig):
    """Samples generated at each evaluation and written to samples.jsonl."""

    prompts: Annotated[tuple[str, ...], SAFE] = ("def ",)
    """Prompts to continue, one sample each; none: no samples. An empty prompt starts a new document."""


class ProfileConfig(Config):
    """Trace of some steps, written to the run's trace.json; open it in chrome://tracing or ui.perfetto.dev."""

    start: Annotated[int, SAFE] = Field(3, ge=1, le=MAX_COUNT)
    """First step to trace; the first two steps also allocate and compile."""
    steps: Annotated[int, SAFE] = Field(0, ge=0, le=1000)
    """Steps to trace; 0: none."""


class SpikeConfig(Config):
    """Handling of loss spikes and of NaN or inf; an update with NaN or inf is always skipped."""

    max_skips: Annotated[int, SAFE] = Field(10, ge=1, le=MAX_COUNT)
    """Consecutive updates skipped for NaN or inf before the run stops."""
    window: Annotated[int, SAFE] = Field(128, ge=16, le=65_536)
    """Number of recent losses, spikes excluded, that a new loss is compared with."""
    threshold: Annotated[float, SAFE] = Field(8.0, gt=0)
    """Minimum rise of a spike above the window's median, in robust deviations (1.4826 median absolute deviations)."""
    least_rise: Annotated[float, SAFE] = Field(0.2, ge=0)
    """Minimum rise of a spike above the window's median, in nats; a spike exceeds both minimums."""
    rollback: Annotated[bool, SAFE] = False
    """After a spike, return to the last checkpoint of --checkpoint.interval before it and train on without the batches
    of the bad steps."""
    max_rollbacks: Annotated[int, SAFE] = Field(3, ge=1, le=MAX_COUNT)
    """Rollbacks before the run stops."""
    # SAFE: once a run has begun, its own journal holds these records.
    journal: Annotated[FilePath | None, SAFE] = None
    """journal.jsonl of another run on the same data: skip the batches that it skipped."""
