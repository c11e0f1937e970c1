"""The architecture of the model."""

from typing import Self

from pydantic import Field, model_validator

from gpt.configs.base import Config


class GPTConfig(Config):
    """Sizes of a GPT-2: names as in the GPT-2 report and its released code."""

    n_layer: int = Field(3, ge=1, le=10_000)
    """Transformer blocks."""
    n_head: int = Field(4, ge=1, le=1_000_000)
    """Attention heads; divides n_embd."""
    n_embd: int = Field(256, ge=1, le=1_000_000)
    """Width of the residual stream."""
    block_size: int = Field(128, ge=1, le=2**26)
    """Longest context in tokens; one training sequence is this long."""
    vocab_size: int = Field(0, ge=0, le=2**31)
    """Rows of the embedding; 0 takes the tokenizer's size, a larger one pads it."""
    dropout: float = Field(0.0, ge=0, lt=1)
    """Probability of dropping an activation (embeddings, attention weights, residual branches)."""
    bias: bool = True
    """Biases in linear layers and layer norms, as GPT-2 has them."""

    @property
    def n_parameters(self) -> int:
        """Trained numbers of a GPT of these sizes; the tied head counts once."""
        matrices = 12 * self.n_embd**2
        vectors = (2 + (9 + 2 if self.bias else 0)) * self.n_embd  # two norms' weights; biases of four linears and them
        embeddings = (self.vocab_size + self.block_size) * self.n_embd
        return embeddings + self.n_layer * (matrices + vectors) + (2 if self.bias else 1) * self.n_embd

    @model_validator(mode="after")
    def _heads_divide_width(self) -> Self:
        if self.n_embd % self.n_head:
            below = self.n_embd - self.n_embd % self.n_head
            nearest = " or ".join(str(n) for n in (below, below + self.n_head) if n)
            raise ValueError(f"n_embd={self.n_embd} is not divisible by n_head={self.n_head}; nearest: {nearest}")
        return self
