"""The architecture of the model."""

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from gpt.configs.base import Config
from gpt.configs.resume_rule import NEEDS_FLAG


class GPTConfig(Config):
    """A GPT: names as in the GPT-2 report and its released code, which the defaults of all but the sizes follow."""

    n_layer: int = Field(3, ge=1, le=10_000)
    """Transformer blocks."""
    n_head: int = Field(4, ge=1, le=1_000_000)
    """Attention heads; divides n_embd."""
    n_kv_head: int = Field(0, ge=0, le=1_000_000)
    """Heads of keys and values, shared by groups of attention heads; divides n_head; 0: as many as those."""
    n_embd: int = Field(256, ge=1, le=1_000_000)
    """Width of the residual stream."""
    block_size: int = Field(128, ge=1, le=2**26)
    """Longest context in tokens; one training sequence is this long."""
    vocab_size: int = Field(0, ge=0, le=2**31)
    """Rows of the embedding; 0 takes the tokenizer's size, a larger one pads it."""
    # NEEDS_FLAG, not FORBIDDEN: no weight's shape or meaning depends on it.
    dropout: Annotated[float, NEEDS_FLAG] = Field(0.0, ge=0, lt=1)
    """Probability of dropping an activation (embeddings, attention weights, residual branches)."""
    bias: bool = True
    """Biases in linear layers and layer norms, as GPT-2 has them."""
    position: Literal["learned", "rotary"] = "learned"
    """How a token knows its place: a learned embedding, or queries and keys that are turned by their position."""
    norm: Literal["layernorm", "rmsnorm"] = "layernorm"
    """Norm before each branch of a block and before the head."""
    mlp: Literal["gelu", "gelu_erf", "relu2", "swiglu"] = "gelu"
    """Activation of the MLP: gelu in the tanh form, as GPT-2 has it; gelu_erf exactly, as in nanoGPT; swiglu
    is gated, and narrower, so that it has as many weights."""
    qk_norm: bool = False
    """Normalise the queries and keys of each head."""
    logit_softcap: float = Field(0.0, ge=0, le=1e6)
    """Bound of the logits, reached smoothly: cap * tanh(logits / cap); 0: none."""

    @property
    def head_dim(self) -> int:
        """Channels of one head."""
        return self.n_embd // self.n_head

    @property
    def kv_heads(self) -> int:
        """Heads of keys and values."""
        return self.n_kv_head or self.n_head

    @property
    def intermediate_size(self) -> int:
        """Channels that the MLP's second layer reads."""
        if self.mlp == "swiglu":  # two thirds of 4 * n_embd (Shazeer 2020, section 3), to a multiple of 8
            return -(-8 * self.n_embd // 24) * 8
        return 4 * self.n_embd

    @property
    def mlp_parts(self) -> tuple[int, ...]:
        """Channels that the MLP's first layer makes: a gated activation takes two for each that it gives."""
        return (self.intermediate_size,) * (2 if self.mlp == "swiglu" else 1)

    @property
    def n_parameters(self) -> int:
        """Trained numbers of a GPT of these sizes; the tied head counts once."""
        norm = 2 if self.bias and self.norm == "layernorm" else 1  # for each channel: a weight, perhaps a bias
        qkv = self.n_embd + 2 * self.kv_heads * self.head_dim
        fc = sum(self.mlp_parts)
        block = self.n_embd * (qkv + self.n_embd + fc + self.intermediate_size)
        if self.bias:
            block += qkv + self.n_embd + fc + self.n_embd
        block += 2 * norm * self.n_embd + (2 * norm * self.head_dim if self.qk_norm else 0)
        embedded = self.vocab_size + (self.block_size if self.position == "learned" else 0)
        return (embedded + norm) * self.n_embd + self.n_layer * block

    @model_validator(mode="after")
    def _heads_fit(self) -> Self:
        if self.n_embd % self.n_head:
            nearest = _nearest(self.n_embd, self.n_head)
            raise ValueError(f"n_embd={self.n_embd} is not divisible by n_head={self.n_head}; nearest: {nearest}")
        if self.n_head % self.kv_heads:
            fitting = next(n for n in range(min(self.kv_heads, self.n_head), 0, -1) if self.n_head % n == 0)
            raise ValueError(f"n_kv_head={self.n_kv_head} does not divide n_head={self.n_head}; nearest: {fitting}")
        if self.position == "rotary" and self.head_dim % 2:
            raise ValueError(
                f"position=rotary turns pairs of channels, and n_embd={self.n_embd} over n_head={self.n_head} gives "
                f"each head {self.head_dim}; nearest n_embd: {_nearest(self.n_embd, 2 * self.n_head)}"
            )
        return self


def _nearest(number: int, divisor: int) -> str:
    """The multiples of `divisor` on both sides of a number that is none."""
    below = number - number % divisor
    return " or ".join(str(n) for n in (below, below + divisor) if n)
