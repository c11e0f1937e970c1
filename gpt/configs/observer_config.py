"""What is watched while a run trains."""

from pydantic import Field

from gpt.configs.base import MAX_COUNT, Config, FilePath


class LogConfig(Config):
    """The console and metrics.jsonl."""

    interval: int = Field(10, ge=1)
    """Steps between two reports of the training loss."""
    grad_norms: bool = False
    """Report the norm of each layer's gradient and weights, too: grad_norm/LAYER and param_norm/LAYER."""
    sink_timeout: float = Field(60.0, gt=0)
    """Seconds that the console, metrics.jsonl or another sink may block the run before it is dropped."""


class EvalConfig(Config):
    """Evaluation on the validation set; the last step is evaluated whatever the interval."""

    interval: int = Field(200, ge=0)
    """Steps between evaluations; 0: only the last step."""
    batches: int = Field(0, ge=0)
    """Micro-batches per evaluation; 0: the whole validation set."""


class SampleConfig(Config):
    """How text is drawn from the model, during training and by `gpt sample`."""

    max_new_tokens: int = Field(200, ge=1, le=MAX_COUNT)
    """Tokens to draw at most; an end-of-text token ends a text earlier."""
    temperature: float = Field(0.8, ge=0)
    """Divides the logits; 0 takes the most likely token each time."""
    top_k: int = Field(0, ge=0, le=MAX_COUNT)
    """Draw among the k most likely tokens; 0: among all."""
    top_p: float = Field(1.0, gt=0, le=1)
    """Draw among the most likely tokens that together have this probability."""


class TextSampleConfig(SampleConfig):
    """Texts that are drawn at each evaluation and written to samples.jsonl."""

    prompts: tuple[str, ...] = ("def ",)
    """Prompts to continue; none: draw no text. An empty prompt starts a document."""


class ProfileConfig(Config):
    """A trace of some steps, written to the run's trace.json; chrome://tracing and ui.perfetto.dev show it."""

    start: int = Field(3, ge=1, le=MAX_COUNT)
    """The first step to trace; the very first ones are not like the others."""
    steps: int = Field(0, ge=0, le=1000)
    """Steps to trace; 0: none."""


class SpikeConfig(Config):
    """What is done about a loss that is out of line: NaN or inf, of which an update is never made, or a spike."""

    max_skips: int = Field(10, ge=1, le=MAX_COUNT)
    """Updates in a row that are skipped for a NaN or inf before the run ends."""
    window: int = Field(128, ge=16, le=65_536)
    """Losses that a new one is compared with: the last ones that were no spikes."""
    threshold: float = Field(8.0, gt=0)
    """A spike lies so many robust deviations (1.4826 median absolute deviations) above the window's median."""
    least_rise: float = Field(0.2, ge=0)
    """And so many nats above it, so that a flat stretch makes no spikes."""
    rollback: bool = False
    """After a spike go back to the last checkpoint before it, and on without the batches of the bad steps."""
    max_rollbacks: int = Field(3, ge=1, le=MAX_COUNT)
    """How often a run goes back before it ends."""
    journal: FilePath | None = None
    """journal.jsonl of another run on the same data: leave out the batches that it left out."""
