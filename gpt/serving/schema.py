"""Bodies of requests, as OpenAI's API defines them; fields that are not supported are refused by name."""

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from gpt.configs.observer_config import SampleConfig

MAX_PROMPTS, MAX_COMPLETIONS, MAX_STOPS, MAX_LOGPROBS, MAX_MESSAGES = 32, 16, 16, 20, 1000
MAX_TEXT_CHARACTERS = 1_000_000

Prompt = str | list[str] | list[int] | list[list[int]]


class StreamOptions(BaseModel):
    """Options of a stream."""

    model_config = ConfigDict(extra="forbid")
    include_usage: bool = False


class GenerationRequest(BaseModel):
    """Fields that completions and conversations share; top_k, min_p, ... are extensions, as in vLLM."""

    model_config = ConfigDict(extra="forbid")
    model: str = ""
    temperature: float = Field(1.0, ge=0, le=100)
    top_p: float = Field(1.0, gt=0, le=1)
    top_k: int = Field(0, ge=0)
    min_p: float = Field(0.0, ge=0, le=1)
    repetition_penalty: float = Field(1.0, gt=0, le=1000)
    n: int = Field(1, ge=1, le=MAX_COMPLETIONS)
    stop: str | Annotated[list[str], Field(max_length=MAX_STOPS)] | None = None
    stop_token_ids: list[int] = Field(default_factory=list, max_length=MAX_STOPS)
    seed: int | None = Field(None, ge=0, lt=2**63)
    stream: bool = False
    stream_options: StreamOptions | None = None
    user: str | None = None
    # Accepted with the only value that is supported, because clients send it.
    frequency_penalty: Literal[0] = 0
    presence_penalty: Literal[0] = 0
    logit_bias: None = None

    def build_config(self, max_new_tokens: int) -> SampleConfig:
        """Return the settings of generation.

        Raises:
            ValidationError: a value that they do not allow.
        """
        return SampleConfig(
            max_new_tokens=max_new_tokens,
            temperature=self.temperature,
            top_k=self.top_k,
            top_p=self.top_p,
            min_p=self.min_p,
            repetition_penalty=self.repetition_penalty,
            stop=(self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ()),
            stop_tokens=tuple(self.stop_token_ids),
        )


class CompletionRequest(GenerationRequest):
    """Body of /v1/completions."""

    prompt: Prompt = ""
    max_tokens: int = Field(16, ge=1)
    logprobs: int | None = Field(None, ge=0, le=MAX_LOGPROBS)
    best_of: Literal[1] = 1
    echo: Literal[False] = False
    suffix: None = None

    @property
    def n_top_logprobs(self) -> int | None:
        """Number of most likely tokens to report at each position; None: no log-probabilities at all."""
        return self.logprobs

    def list_prompts(self) -> list[str | list[int]]:
        """Return each prompt, as text or as token ids."""
        if isinstance(self.prompt, str):
            return [self.prompt]
        if self.prompt and all(isinstance(item, int) for item in self.prompt):
            return [[item for item in self.prompt if isinstance(item, int)]]
        return [item for item in self.prompt if not isinstance(item, int)]


class TextPart(BaseModel):
    """Part of a message; parts of other types, such as images, are not supported."""

    model_config = ConfigDict(extra="forbid")
    type: Literal["text"]
    text: str


class ChatMessage(BaseModel):
    """Turn of a conversation."""

    model_config = ConfigDict(extra="forbid")
    role: Literal["system", "developer", "user", "assistant"]
    content: str | list[TextPart]
    name: str | None = None

    def describe(self) -> dict[str, Any]:
        """Return the message as chat templates take it: the content is one text."""
        content = self.content if isinstance(self.content, str) else "".join(part.text for part in self.content)
        return {"role": self.role, "content": content} | ({} if self.name is None else {"name": self.name})


class ChatRequest(GenerationRequest):
    """Body of /v1/chat/completions."""

    messages: list[ChatMessage] = Field(min_length=1, max_length=MAX_MESSAGES)
    max_completion_tokens: int | None = Field(None, ge=1)
    max_tokens: int | None = Field(None, ge=1)
    """Former name of max_completion_tokens."""
    logprobs: bool = False
    top_logprobs: int | None = Field(None, ge=0, le=MAX_LOGPROBS)

    @model_validator(mode="after")
    def _require_logprobs(self) -> "ChatRequest":
        if self.top_logprobs is not None and not self.logprobs:
            raise ValueError("top_logprobs needs logprobs true")
        return self

    @property
    def n_top_logprobs(self) -> int | None:
        """Number of most likely tokens to report at each position; None: no log-probabilities at all."""
        return (self.top_logprobs or 0) if self.logprobs else None


class ScoreRequest(BaseModel):
    """Body of /v1/score, an extension: the loss of each token of a text."""

    model_config = ConfigDict(extra="forbid")
    model: str = ""
    text: str = Field(min_length=1, max_length=MAX_TEXT_CHARACTERS)
